"""Write files atomically into the target of a build, a folder or an fsspec URL: no file is visible before it is whole.

In a folder a file is written under a temporary name, fsynced and renamed. For a URL it is written on this machine and
then uploaded: an object store shows an upload when it is whole. On a store that does not (SFTP), a killed upload leaves
a torn file, which nothing refers to yet and the next run writes again.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from shards.errors import UsageError
from shards.files import FolderLock, atomic_file
from shards.urls import filesystem_of, reach, without_password
from shards.writing.claim import claimed

WORK = ".build"
"""Work folder in the set: the files that let a build resume after a kill; deleted when the set is complete."""
CLAIM = f"{WORK}/lock"
"""File that keeps a second build out."""


class Target(Protocol):
    """Destination of one set. File names are relative to it, with forward slashes."""

    @property
    def location(self) -> str:
        """Path or URL of the target."""
        ...

    def lock(self) -> AbstractContextManager[None]:
        """Create the target, and hold an exclusive lock on it for a block, where that is possible.

        Raises UsageError when another build holds it.
        """
        ...

    def has_foreign_files(self) -> bool:
        """True if there are files outside of `WORK`."""
        ...

    def work_files(self) -> set[str]:
        """Names of the files in `WORK`, relative to it."""
        ...

    def exists(self, name: str) -> bool:
        """True if there is a file of that name."""
        ...

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading, with random access."""
        ...

    def create(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """Open a new file for writing; it is published under its name when the block succeeds, else deleted.

        Raises OSError or ToolkitError that names the file (a full disk).
        """
        ...

    def delete(self, names: Iterable[str]) -> None:
        """Delete files; missing ones are ignored."""
        ...

    def clear_work(self) -> None:
        """Delete `WORK`."""
        ...


def read_bytes(target: Target, name: str) -> bytes:
    """Read a whole file."""
    with target.open(name) as file:
        return file.read()


def write_bytes(target: Target, name: str, data: bytes) -> None:
    """Write a whole file atomically."""
    with target.create(name) as file:
        file.write(data)


def open_target(location: str | Path) -> Target:
    """Open the target at a path or URL, without creating it. Raises UsageError for a URL that cannot be written to."""
    location = str(location)
    if "://" not in location:
        return FolderTarget(Path(location))
    if location.startswith(("file://", "local://")):
        return FolderTarget(Path(filesystem_of(location)[1]))
    try:
        with reach(location, "written to", passing=(ImportError, ValueError)):
            filesystem_of(location)  # some connect here
    except (ImportError, ValueError) as error:
        raise UsageError(
            f"--out {without_password(location)}: cannot be written to ({error}); "
            "install what it needs or give a folder"
        ) from error
    return UrlTarget(location.rstrip("/"))


@dataclass(frozen=True)
class FolderTarget:
    """A local or shared folder."""

    root: Path

    @property
    def location(self) -> str:
        """Path of the folder."""
        return str(self.root)

    @contextmanager
    def lock(self) -> Generator[None]:
        """Create the folder and lock it by fcntl for a block; a folder that was created and is empty then is deleted.

        Raises UsageError when another process on this machine, or on one that shares its locks, holds the lock.
        """
        if self.root.exists() and not self.root.is_dir():
            raise UsageError(f"{self.root}: a file is in the way; give a folder for --out")
        created = [path for path in [self.root, *self.root.parents] if not path.exists()]
        work = self.root / WORK
        work.mkdir(parents=True, exist_ok=True)
        in_use = f"{self.root}: another build is at work there; wait for its end or give another --out"
        try:
            with FolderLock(self.root / CLAIM, in_use) as lock:
                lock.acquire()
                for part in work.glob("*.part"):
                    part.unlink(missing_ok=True)  # a worker that outlives a killed build may delete it first
                yield
        finally:
            for folder in created:
                if any(folder.iterdir()):
                    break
                folder.rmdir()

    def has_foreign_files(self) -> bool:
        """True if there are files outside of `WORK`."""
        return any(path.name != WORK for path in self.root.iterdir())

    def work_files(self) -> set[str]:
        """Names of the files in `WORK`, relative to it."""
        return {path.name for path in (self.root / WORK).iterdir()}

    def exists(self, name: str) -> bool:
        """True if there is a file of that name."""
        return (self.root / name).exists()

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading."""
        return (self.root / name).open("rb")

    @contextmanager
    def create(self, name: str) -> Generator[IO[bytes]]:
        """Write to a temporary file in `WORK`, and rename it when the block succeeds. Raises OSError that names it."""
        path = self.root / name
        # With the host's name: several machines may write into one folder.
        temporary = self.root / WORK / f"{name.replace('/', '-')}.{socket.gethostname()}.{os.getpid()}.part"
        path.parent.mkdir(exist_ok=True)
        with atomic_file(path, temporary), temporary.open("wb") as file:
            yield file

    def delete(self, names: Iterable[str]) -> None:
        """Delete files; missing ones are ignored."""
        for name in names:
            (self.root / name).unlink(missing_ok=True)

    def clear_work(self) -> None:
        """Delete `WORK`."""
        shutil.rmtree(self.root / WORK, ignore_errors=True)


@dataclass(frozen=True)
class UrlTarget:
    """A folder behind an fsspec URL."""

    url: str

    @property
    def location(self) -> str:
        """The URL, without a password."""
        return without_password(self.url)

    def lock(self) -> AbstractContextManager[None]:
        """Hold a claim of the URL for a block (`shards.writing.claim`). Raises UsageError when another build does."""
        return claimed(_ClaimOfUrl(self), self.location)

    def has_foreign_files(self) -> bool:
        """True if there are files outside of `WORK`."""
        return any(not name.startswith(f"{WORK}/") for name in self._names(""))

    def work_files(self) -> set[str]:
        """Names of the files in `WORK`, relative to it."""
        return set(self._names(WORK))

    def exists(self, name: str) -> bool:
        """True if there is a file of that name. Raises ToolkitError."""
        with self.filesystem("read") as (filesystem, root):
            return filesystem.exists(f"{root}/{name}")

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading. Raises ToolkitError."""
        with self.filesystem("read") as (filesystem, root):
            return filesystem.open(f"{root}/{name}", "rb")

    @contextmanager
    def create(self, name: str) -> Generator[IO[bytes]]:
        """Write to a temporary file here, and upload it when the block succeeds. Raises ToolkitError."""
        with tempfile.NamedTemporaryFile() as file:
            yield file
            file.flush()
            with self.filesystem("written") as (filesystem, root):
                path = f"{root}/{name}"
                _make_folder_of(path, filesystem)
                filesystem.put_file(file.name, path)

    def delete(self, names: Iterable[str]) -> None:
        """Delete files; missing ones are ignored. Raises ToolkitError."""
        with self.filesystem("deleted") as (filesystem, root):
            for name in names:
                path = f"{root}/{name}"
                if filesystem.exists(path):
                    filesystem.rm_file(path)

    def clear_work(self) -> None:
        """Delete `WORK`. Raises ToolkitError."""
        names = self._names(WORK)
        with self.filesystem("deleted") as (filesystem, root):
            if names:  # file by file: a recursive deletion may take an empty bucket with it
                filesystem.rm([f"{root}/{WORK}/{name}" for name in names])

    def _names(self, below: str) -> list[str]:
        with self.filesystem("listed") as (filesystem, root):
            path = f"{root}/{below}".rstrip("/")
            found: list[str] = filesystem.find(path) if filesystem.exists(path) else []
            return [name[len(path) + 1 :] for name in found]

    @contextmanager
    def filesystem(self, action: str) -> Generator[tuple[Any, str]]:
        """Open the file system and the path in it, for a block. Raises ToolkitError (`shards.urls.reach`)."""
        with reach(self.url, action):
            filesystem, root = filesystem_of(self.url)
            filesystem.invalidate_cache()  # another process may have written since
            yield filesystem, root


@dataclass(frozen=True)
class _ClaimOfUrl:
    """Claim of a build (`shards.writing.claim.Store`): an object in the URL's `WORK`."""

    target: UrlTarget

    def create(self, data: bytes) -> bool:
        with self.target.filesystem("written") as (filesystem, root):
            path = f"{root}/{CLAIM}"
            _make_folder_of(path, filesystem)
            try:
                filesystem.pipe_file(path, data, mode="create")
            except FileExistsError:
                return False
        return True

    def read(self) -> bytes | None:
        with self.target.filesystem("read") as (filesystem, root):
            try:
                return filesystem.cat_file(f"{root}/{CLAIM}")
            except FileNotFoundError:
                return None

    def write(self, data: bytes) -> None:
        with self.target.filesystem("written") as (filesystem, root):
            filesystem.pipe_file(f"{root}/{CLAIM}", data)

    def delete(self) -> None:
        self.target.delete([CLAIM])


def _make_folder_of(path: str, filesystem: Any) -> None:
    if not filesystem.async_impl:  # the others are object stores: no folders, and S3 would make a bucket
        filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
