"""Where a shard set is written: a folder, or an fsspec URL. No file has its name there before it is whole.

In a folder a file is written under another name, brought to the disk and renamed. Behind a URL it is written on this
machine and then uploaded: an object store shows an upload when it is whole. On a store that does not (SFTP), a killed
upload leaves a torn file, which nothing names yet and the next run writes again.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from shards.errors import ToolkitError, UsageError
from shards.files import atomic_file
from shards.inputs.source import filesystem_of

WORK = ".build"
"""Folder in the set for what is needed to go on after a kill; gone when the set is complete."""


class Target(Protocol):
    """A place for one set. Names are relative to it, with forward slashes."""

    @property
    def location(self) -> str:
        """Its path or URL."""
        ...

    def taken(self) -> AbstractContextManager[None]:
        """Make the place for a block, and keep other builds out of it where that can be done.

        Raises UsageError when another build is at work there.
        """
        ...

    def has_foreign_files(self) -> bool:
        """Whether there are files that are not below `WORK`."""
        ...

    def work(self) -> set[str]:
        """The names of the files in `WORK`, without it."""
        ...

    def exists(self, name: str) -> bool:
        """Whether there is a file of that name."""
        ...

    def open(self, name: str) -> IO[bytes]:
        """A file for reading anywhere in it."""
        ...

    def writing(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """A new file that gets its name when the block ends well; else nothing is left.

        What goes wrong (a full disk) is raised as OSError or ToolkitError that names the file.
        """
        ...

    def delete(self, names: Iterable[str]) -> None:
        """Take files away; those that are not there do not matter."""
        ...

    def clear(self, below: str = "") -> None:
        """Take away all there is, or all below a folder."""
        ...


def read(target: Target, name: str) -> bytes:
    """The bytes of a file."""
    with target.open(name) as file:
        return file.read()


def publish(target: Target, name: str, data: bytes) -> None:
    """Write a whole file."""
    with target.writing(name) as file:
        file.write(data)


def open_target(place: str | Path) -> Target:
    """The target at a path or URL; nothing is made yet. Raises UsageError for a URL that cannot be written to."""
    place = str(place)
    if "://" not in place:
        return FolderTarget(Path(place))
    if place.startswith(("file://", "local://")):
        return FolderTarget(Path(filesystem_of(place)[1]))
    try:
        filesystem_of(place)
    except (ImportError, ValueError) as error:
        raise UsageError(
            f"--out {place}: cannot be written to ({error}); install what it needs or give a folder"
        ) from error
    return UrlTarget(place.rstrip("/"))


@dataclass(frozen=True)
class FolderTarget:
    """A folder."""

    root: Path

    @property
    def location(self) -> str:
        return str(self.root)

    @contextmanager
    def taken(self) -> Iterator[None]:
        if self.root.exists() and not self.root.is_dir():
            raise UsageError(f"{self.root}: a file is in the way; give a folder for --out")
        made = [path for path in [self.root, *self.root.parents] if not path.exists()]
        work = self.root / WORK
        work.mkdir(parents=True, exist_ok=True)
        try:
            with (work / "lock").open("ab") as file:
                try:
                    # Of this process alone, unlike flock: a worker that outlives a killed build does not hold it.
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except (BlockingIOError, PermissionError) as error:
                    raise UsageError(
                        f"{self.root}: another build is at work there; wait for its end or give another --out"
                    ) from error
                for part in work.glob("*.part"):
                    part.unlink(missing_ok=True)  # a worker that outlives a killed build may take it away itself
                yield
        finally:
            for folder in made:
                if any(folder.iterdir()):
                    break
                folder.rmdir()

    def has_foreign_files(self) -> bool:
        return any(path.name != WORK for path in self.root.iterdir())

    def work(self) -> set[str]:
        return {path.name for path in (self.root / WORK).iterdir()}

    def exists(self, name: str) -> bool:
        return (self.root / name).exists()

    def open(self, name: str) -> IO[bytes]:
        return (self.root / name).open("rb")

    @contextmanager
    def writing(self, name: str) -> Iterator[IO[bytes]]:
        path = self.root / name
        # Several machines may write into one folder.
        temporary = self.root / WORK / f"{name.replace('/', '-')}.{socket.gethostname()}.{os.getpid()}.part"
        path.parent.mkdir(exist_ok=True)
        with atomic_file(path, temporary), temporary.open("wb") as file:
            yield file

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            (self.root / name).unlink(missing_ok=True)

    def clear(self, below: str = "") -> None:
        if below:
            shutil.rmtree(self.root / below, ignore_errors=True)
            return
        for path in self.root.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


@dataclass(frozen=True)
class UrlTarget:
    """A folder behind an fsspec URL. Nothing keeps a second build out of it."""

    location: str

    @contextmanager
    def taken(self) -> Iterator[None]:
        yield

    def has_foreign_files(self) -> bool:
        return any(not name.startswith(f"{WORK}/") for name in self._names(""))

    def work(self) -> set[str]:
        return set(self._names(WORK))

    def exists(self, name: str) -> bool:
        with self._filesystem("read") as (filesystem, root):
            return filesystem.exists(f"{root}/{name}")

    def open(self, name: str) -> IO[bytes]:
        with self._filesystem("read") as (filesystem, root):
            return filesystem.open(f"{root}/{name}", "rb")

    @contextmanager
    def writing(self, name: str) -> Iterator[IO[bytes]]:
        with tempfile.NamedTemporaryFile() as file:
            yield file
            file.flush()
            with self._filesystem("written") as (filesystem, root):
                path = f"{root}/{name}"
                if not filesystem.async_impl:  # the others are object stores: no folders, and S3 would make a bucket
                    filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
                filesystem.put_file(file.name, path)

    def delete(self, names: Iterable[str]) -> None:
        with self._filesystem("deleted") as (filesystem, root):
            for name in names:
                path = f"{root}/{name}"
                if filesystem.exists(path):
                    filesystem.rm_file(path)

    def clear(self, below: str = "") -> None:
        names = self._names(below)
        with self._filesystem("deleted") as (filesystem, root):
            path = f"{root}/{below}".rstrip("/")
            if names:  # file by file: a recursive deletion may take an empty bucket with it
                filesystem.rm([f"{path}/{name}" for name in names])

    def _names(self, below: str) -> list[str]:
        with self._filesystem("listed") as (filesystem, root):
            path = f"{root}/{below}".rstrip("/")
            there = filesystem.exists(path)
            return [found[len(path) + 1 :] for found in filesystem.find(path)] if there else []

    @contextmanager
    def _filesystem(self, done: str) -> Iterator[tuple[Any, str]]:
        """The file system and the path in it, for something that is to be `done`: the stores' errors are many."""
        try:
            filesystem, root = filesystem_of(self.location)
            filesystem.invalidate_cache()  # another process may have written since
            yield filesystem, root
        except Exception as error:
            what = " ".join(str(error).split()) or type(error).__name__
            raise ToolkitError(f"{self.location}: cannot be {done} ({what}); check the URL and your rights") from error
