"""The copies of remote shards on this node: each is fetched once, whatever the number of processes.

    CACHE/shards/<digest of the set>/train/000007.tar            whole, with the size and sha256 of the index
    CACHE/shards/<digest of the set>/train/000007.tar.SIZE.part  on its way, SIZE bytes when it is whole
    CACHE/shards/<digest of the set>/train/000007.tar.lock       held by the one that fetches it

CACHE is `cache_root()`. A copy that is open is locked (shared), so that nobody evicts what is read now; what
a killed process has left of a copy is fetched anew or evicted by the next.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from shards import format
from shards.errors import CorruptShardError, ShardSetError, ToolkitError, UsageError
from shards.files import publish
from shards.remote.folder import RemoteFolder

WAIT_FOR_ROOM = 10.0  # seconds in which other processes may let go of what they read
POLL = 0.05  # seconds

Entry = Mapping[str, Any]
"""A file of a set as its index names it: name, bytes, sha256."""
Inspect = Callable[[Path], None]


@dataclass(frozen=True, kw_only=True)
class NodeCache:
    """Where copies of remote files are kept, and how many of them."""

    root: Path = field(default_factory=lambda: cache_root() / "shards")
    """The folder, on a disk of this node."""
    limit: int = 0
    """Bytes of all copies of all sets; 0: as many as there are."""

    def reserve(self, part: Path, size: int, keep: Collection[Path] = ()) -> bool:
        """Whether `size` bytes fit; then `part` stands for them. The oldest unused copies are evicted for it.

        `keep`: copies that are not evicted though nobody reads them now.
        """
        if not self.limit:
            return True
        with FileLock(self.root / "room.lock"):
            files = sorted(self._files(), key=lambda file: file[0])
            taken = sum(size for _, size, _ in files)
            for _, freed, path in files:
                if taken + size <= self.limit:
                    break
                if path not in keep and _evict(path):
                    taken -= freed
            if taken + size > self.limit:
                return False
            part.touch()
            return True

    def _files(self) -> list[tuple[int, int, Path]]:
        """(time of the last use in nanoseconds, bytes, path) of each copy, those on their way included."""
        found = []
        for path in self.root.glob("*/**/*"):
            try:
                status = path.stat()
            except FileNotFoundError:  # it has just got its final name
                continue
            if path.suffix == ".lock" or not stat.S_ISREG(status.st_mode):
                continue
            size = int(path.suffixes[-2][1:]) if path.suffix == ".part" else status.st_size
            found.append((status.st_mtime_ns, size, path))
        return found


class Copies:
    """The copies of one remote set on this node."""

    def __init__(self, remote: RemoteFolder, cache: NodeCache, digest: str) -> None:
        """`digest` of the set: another set under the same URL has another folder."""
        self.remote, self.cache, self._digest = remote, cache, digest
        self.root = cache.root / digest
        """The folder of the copies."""

    def open(self, entry: Entry, inspect: Inspect = lambda path: None) -> BinaryIO:
        """A whole copy, fetched when there is none; as long as the file (or a map of it) is open it stays.

        `inspect` is given a file that has not the bytes of the index, to raise what is wrong with it in detail.
        Raises what `RemoteFolder.fetch` raises, ShardSetError when by now another set lies there, and UsageError when
        the cache's limit leaves no room.
        """
        until = None
        while (file := self._opened(entry)) is None:
            try:
                fetched = self.fetch(entry, inspect)
            except ShardSetError as error:
                wrong = isinstance(error, CorruptShardError) or isinstance(error.__cause__, FileNotFoundError)
                if wrong and self._replaced():
                    raise ShardSetError(
                        f"{self.remote.location}: another shard set lies there than when it was opened; "
                        "start again with it, in a new run folder"
                    ) from error
                raise
            if fetched:
                continue
            until = until or time.monotonic() + WAIT_FOR_ROOM
            if time.monotonic() > until:
                raise UsageError(
                    f"{self.cache.root}: the {self.cache.limit} bytes of the cache are in use, and {entry['name']} "
                    f"needs {entry['bytes']} more; give it more room (--stream.cache-size)"
                )
            time.sleep(POLL)
        return file

    def fetch(
        self,
        entry: Entry,
        inspect: Inspect = lambda path: None,
        keep: Collection[Path] = (),
    ) -> bool:
        """Fetch a file unless there is a copy. Returns False when there is no room for it but that of `keep`."""
        path, size = self.path(entry), entry["bytes"]
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{size}.part")
        with FileLock(_lock_of(path), poll_interval=POLL):
            if path.exists():
                return True
            part.unlink(missing_ok=True)  # a killed process may have left it
            if not self.cache.reserve(part, size, keep):
                return False
            try:
                self.remote.fetch(entry["name"], part, size, entry["sha256"])
                publish(part, path)
            except CorruptShardError:
                inspect(part)
                raise
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise ShardSetError(
                    f"{self.cache.root}: the disk has no room for {entry['name']} ({size} bytes); make some, set "
                    "ISICDIST_CACHE to a folder on another disk, or keep less with --stream.cache-size"
                ) from error
            finally:
                part.unlink(missing_ok=True)
        return True

    def drop(self, entry: Entry) -> None:
        """Forget a copy that has gone bad."""
        self.path(entry).unlink(missing_ok=True)

    def path(self, entry: Entry) -> Path:
        """Where the copy of a file lies, or will."""
        return self.root / entry["name"]

    def _replaced(self) -> bool:
        """Whether the set that lies at the URL now is another one, as far as can be known."""
        name = format.INDEX_NAME
        try:
            index = format.parse_index(self.remote.read(name), f"{self.remote.location}/{name}")
        except ToolkitError:
            return False
        return index["digest"] != self._digest

    def _opened(self, entry: Entry) -> BinaryIO | None:
        """The copy, locked against eviction; None where there is none."""
        try:
            file = self.path(entry).open("rb")
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        status = os.fstat(file.fileno())
        if status.st_nlink and status.st_size == entry["bytes"]:
            os.utime(file.fileno())
            return file
        file.close()
        if status.st_nlink:
            self.drop(entry)
        return None


def _lock_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _evict(path: Path) -> bool:
    """Remove a copy that no process reads, or what a killed one has left of it; whether it is gone."""
    if path.suffix != ".part":
        return evict(path)
    try:
        with FileLock(_lock_of(path.with_suffix("").with_suffix("")), timeout=0):
            path.unlink()
    except Timeout:
        return False
    except FileNotFoundError:  # somebody else was quicker
        pass
    return True


def cache_root() -> Path:
    """$ISICDIST_CACHE, else $XDG_CACHE_HOME/isicdist, else ~/.cache/isicdist."""
    given = os.environ.get("ISICDIST_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "isicdist"


def evict(path: Path) -> bool:
    """Remove a file that no process reads; whether it is gone."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except BlockingIOError:
        return False
    except FileNotFoundError:  # somebody else was quicker
        pass
    return True
