"""Write files and folders atomically: under its final name a file is complete, however the process ends. Lock folders.

Write to a temporary name in the same folder, fsync, rename, fsync the folder. A killed process leaves at most a
temporary file (`.NAME.PID.new`: see `remove_temporary_files`) or a folder (`.NAME.new`, `.NAME.old`), which the next
write of that name replaces.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Self

from shards.errors import UsageError


def write_file(path: Path, data: bytes) -> None:
    """Write a complete file, or leave `path` unchanged. Raises OSError with its filename."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def atomic_file(path: Path, temporary: Path | None = None) -> Generator[Path]:
    """Yield a temporary path to write to; it replaces `path` on success and is removed on an exception.

    `temporary`: on the same file system as `path`; by default in the same folder. Raises OSError with its filename.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    temporary = temporary or path.with_name(f".{path.name}.{os.getpid()}.new")
    with name_in_errors(path):
        try:
            yield temporary
            publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def remove_temporary_files(folder: Path) -> None:
    """Remove what `atomic_file` left directly in `folder` in processes that were killed."""
    for path in folder.glob(".*.new"):
        process = re.search(r"\.(\d{1,9})\.new$", path.name)
        if process and not _is_alive(int(process[1])):
            path.unlink(missing_ok=True)


def publish(temporary: Path, path: Path) -> None:
    """Flush a written file to the disk (fsync), then rename it to `path`. Raises OSError."""
    _fsync(temporary)
    temporary.replace(path)
    _fsync(path.parent)  # or the name could be lost in a power cut


@contextlib.contextmanager
def atomic_folder(path: Path) -> Generator[Path]:
    """Yield a temporary folder to fill; it replaces the folder `path` on success. Raises OSError with its filename.

    A folder cannot be renamed over a non-empty one: a kill between the two renames leaves `.NAME.old`, which
    `recover_folder` renames back.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = _sibling(path, "new"), _sibling(path, "old")
    with name_in_errors(path):
        shutil.rmtree(new, ignore_errors=True)  # left by a killed process
        new.mkdir()
        try:
            yield new
            for written in (*new.rglob("*"), new):
                _fsync(written)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        new.rename(path)
        _fsync(path.parent)
        shutil.rmtree(old, ignore_errors=True)


def recover_folder(path: Path) -> None:
    """Undo the first of the two renames of `atomic_folder`, if the process was killed between them."""
    old = _sibling(path, "old")
    if old.exists() and not path.exists():
        old.rename(path)


class FolderLock:
    """Lock (fcntl) of a folder by a file in it, so that no two processes write into it at once.

    Once acquired, it is held to the end of a block with it as a context, which deletes the file, or of the process:
    unlike flock by this process alone, so a worker that outlives it has no part in it.
    """

    def __init__(self, path: Path, in_use: str) -> None:
        """Prepare a lock by the file `path`; `in_use` is the message where another process holds it."""
        self._path, self._in_use = path, in_use
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Make the folder and lock it, where its file system can. Raises UsageError when another process holds it."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        while self._descriptor is None:
            with name_in_errors(self._path), contextlib.ExitStack() as stack:
                descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o666)
                stack.callback(os.close, descriptor)
                try:
                    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except (BlockingIOError, PermissionError) as error:
                    raise UsageError(self._in_use) from error
                except OSError as error:
                    if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                        raise
                if self._is_file(descriptor):  # else the process that held it has ended since, and deleted it
                    stack.pop_all()
                    self._descriptor = descriptor

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            if self._is_file(self._descriptor):
                self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None

    def _is_file(self, descriptor: int) -> bool:
        """True if the open file is still the one of the lock's name."""
        try:
            return self._path.stat().st_ino == os.fstat(descriptor).st_ino
        except FileNotFoundError:
            return False


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def _sibling(path: Path, state: str) -> Path:
    return path.with_name(f".{path.name}.{state}")


@contextlib.contextmanager
def name_in_errors(path: Path) -> Generator[None]:
    """Set the filename of an OSError that has none, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
