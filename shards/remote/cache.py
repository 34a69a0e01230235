"""The node's cache of remote files: each is downloaded once, whatever the number of processes.

    CACHE/shards/<digest of the set>/train/000007.tar            complete, with the size and sha256 of the index
    CACHE/shards/<digest of the set>/train/000007.tar.SIZE.part  being downloaded, SIZE bytes when complete
    CACHE/shards/<digest of the set>/train/000007.tar.lock       held by the process that downloads it

CACHE is `cache_folder.cache_root()`. An open file is locked (shared), which protects it from eviction. The unfinished
download of a killed process is downloaded anew or evicted by the next one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from shards import format
from shards.errors import CorruptShardError, ShardSetError, ToolkitError, UsageError
from shards.files import publish
from shards.format import FileEntry, Index
from shards.remote.cache_folder import cache_root
from shards.remote.folder import RemoteFolder

WAIT_FOR_ROOM_SECONDS = 10.0  # in which other processes may release what they read
POLL_SECONDS = 0.05

Inspect = Callable[[Path], None]
"""Called with a downloaded file whose checksum is wrong, to raise a more precise error."""


@dataclass(frozen=True, kw_only=True)
class NodeCache:
    """The folder for downloaded files on this node, and the limit of its size."""

    root: Path = field(default_factory=lambda: cache_root() / "shards")
    """The folder, on a disk of this node."""
    max_bytes: int = 0
    """Limit of all files of all sets together; 0: unlimited."""

    def reserve(self, part: Path, size: int, protected: Collection[Path] = ()) -> bool:
        """Reserve `size` bytes for the download `part`, evicting the least recently used files. False: no room.

        `protected`: files that are not evicted although no process reads them now.
        """
        if not self.max_bytes:
            return True
        with FileLock(self.root / "room.lock"):
            files = sorted(self._files(), key=lambda file: file[0])
            used = sum(size for _, size, _ in files)
            for _, freed, path in files:
                if used + size <= self.max_bytes:
                    break
                if path not in protected and _evict_file_or_part(path):
                    used -= freed
            if used + size > self.max_bytes:
                return False
            part.touch()
            return True

    def _files(self) -> list[tuple[int, int, Path]]:
        """(time of last use in ns, bytes, path) of each file; a download counts with its final size."""
        found: list[tuple[int, int, Path]] = []
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


class CachedSet:
    """The files of one remote set in the cache of this node."""

    def __init__(self, remote: RemoteFolder, cache: NodeCache, digest: str) -> None:
        """`digest` of the set: another set at the same URL gets another folder."""
        self.remote, self.cache, self._digest = remote, cache, digest
        self.root = cache.root / digest
        """The folder of the set's files."""

    def open(self, entry: FileEntry, inspect: Inspect = lambda path: None) -> BinaryIO:
        """Open a file, downloading it first if it is not cached. While it (or a map of it) is open, it is not evicted.

        `inspect(path)` is called on a checksum mismatch and raises a more precise error. Raises what
        `RemoteFolder.download` raises, ShardSetError when the set at the URL has been replaced by another one, and
        UsageError when the cache's limit leaves no room. ShardSetError, too, for a cache folder that cannot be used.
        """
        with self._explain_failures(entry):
            return self._open_or_download(entry, inspect)

    def _open_or_download(self, entry: FileEntry, inspect: Inspect) -> BinaryIO:
        deadline = None
        while (file := self._open_cached(entry)) is None:
            try:
                downloaded = self.download(entry, inspect)
            except ShardSetError as error:
                wrong = isinstance(error, CorruptShardError) or isinstance(error.__cause__, FileNotFoundError)
                if wrong and self._is_replaced():
                    raise ShardSetError(
                        f"{self.remote.location}: another shard set lies there than when it was opened; "
                        "start again with it, in a new run folder"
                    ) from error
                raise
            if downloaded:
                continue
            deadline = deadline or time.monotonic() + WAIT_FOR_ROOM_SECONDS
            if time.monotonic() > deadline:
                raise UsageError(
                    f"{self.cache.root}: the {self.cache.max_bytes} bytes of the cache are in use, and {entry.name} "
                    f"needs {entry.bytes} more; give it more room (--stream.cache-size)"
                )
            time.sleep(POLL_SECONDS)
        return file

    def download(
        self,
        entry: FileEntry,
        inspect: Inspect = lambda path: None,
        protected: Collection[Path] = (),
    ) -> bool:
        """Download a file unless it is cached; one process of the node does, the others wait for it.

        Returns False when there is no room for it without evicting the files of `protected`. Raises what
        `RemoteFolder.download` raises, and ShardSetError when the disk is full or the folder cannot be written.
        """
        with self._explain_failures(entry):
            return self._download(entry, inspect, protected)

    def _download(self, entry: FileEntry, inspect: Inspect, protected: Collection[Path]) -> bool:
        path, size = self.path(entry), entry.bytes
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{size}.part")
        with FileLock(_lock_path(path), poll_interval=POLL_SECONDS):
            if path.exists():
                return True
            part.unlink(missing_ok=True)  # a killed process may have left it
            if not self.cache.reserve(part, size, protected):
                return False
            try:
                self.remote.download(entry, part)
                publish(part, path)
            except CorruptShardError:
                inspect(part)
                raise
            finally:
                part.unlink(missing_ok=True)
        return True

    @contextlib.contextmanager
    def _explain_failures(self, entry: FileEntry) -> Generator[None]:
        """Raise ShardSetError for a folder that cannot be written, has no locks (ENOLCK), or is on a full disk."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ShardSetError(
                    f"{self.cache.root}: the disk has no room for {entry.name} ({entry.bytes} bytes); make some, set "
                    "ISICDIST_CACHE to a folder on another disk, or keep less with --stream.cache-size"
                ) from error
            raise ShardSetError(
                f"{self.cache.root}: downloads cannot be cached there ({error.strerror or error}); set ISICDIST_CACHE "
                "to a folder that can be written, on a local disk"
            ) from error

    def drop(self, entry: FileEntry) -> None:
        """Delete a cached file that turned out to be corrupt."""
        self.path(entry).unlink(missing_ok=True)

    def path(self, entry: FileEntry) -> Path:
        """Give the path of a file in the cache, cached or not."""
        return self.root / entry.name

    def _is_replaced(self) -> bool:
        """True if the set at the URL is another one by now; False if it is the same or cannot be read."""
        name = format.INDEX_NAME
        try:
            index = Index.parse(self.remote.read(name), f"{self.remote.location}/{name}")
        except ToolkitError:
            return False
        return index.digest != self._digest

    def _open_cached(self, entry: FileEntry) -> BinaryIO | None:
        """Open a cached file and lock it against eviction; None if it is not cached or of another size."""
        try:
            file = self.path(entry).open("rb")
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_SH)
        except OSError:
            file.close()
            raise
        status = os.fstat(file.fileno())
        if status.st_nlink and status.st_size == entry.bytes:  # not evicted between open and lock
            os.utime(file.fileno())
            return file
        file.close()
        if status.st_nlink:
            self.drop(entry)
        return None


def evict(path: Path) -> bool:
    """Delete a file unless a process has it open and locked. Returns True if it is gone."""
    try:
        with path.open("r+b") as file:  # an exclusive lock on NFS needs a file that is open for writing
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except BlockingIOError:
        return False
    except FileNotFoundError:  # another process has just evicted it
        pass
    return True


def _evict_file_or_part(path: Path) -> bool:
    """Delete a cached file that no process reads, or the unfinished download of a killed one. True if it is gone."""
    if path.suffix != ".part":
        return evict(path)
    try:
        with FileLock(_lock_path(path.with_suffix("").with_suffix("")), timeout=0):
            path.unlink()
    except Timeout:
        return False
    except FileNotFoundError:  # another process has just evicted it
        pass
    return True


def _lock_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")
