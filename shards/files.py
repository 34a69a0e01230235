"""Write files and folders atomically: under its final name a file is complete, however the process ends.

Write to a temporary name in the same folder, fsync, rename, fsync the folder. A killed process leaves at most a
temporary file (`.NAME.PID.new`: see `remove_temporary_files`) or a folder (`.NAME.new`, `.NAME.old`), which the next
write of that name replaces.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Generator
from pathlib import Path


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
