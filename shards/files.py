"""Write files and folders atomically: what stands under a final name is whole, however the process ends.

Write to a temporary name beside the final one, fsync, rename, fsync the folder. A killed process leaves at most a
temporary file (`.NAME.PID.new`) or folder (`.NAME.new`, `.NAME.old`), which the next write of that name replaces.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def write_file(path: Path, data: bytes) -> None:
    """Write a whole file, or leave `path` as it was. Raises OSError that names `path`."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def atomic_file(path: Path, temporary: Path | None = None) -> Iterator[Path]:
    """Give a temporary path to write to; it replaces `path` when the block ends well, and is removed when it does not.

    `temporary`: on the same file system; beside `path` by default. Raises OSError that names `path`.
    """
    temporary = temporary or path.with_name(f".{path.name}.{os.getpid()}.new")
    with _errors_name(path):
        try:
            yield temporary
            publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def publish(temporary: Path, path: Path) -> None:
    """Bring a written file to the disk, then rename it to `path`."""
    _fsync(temporary)
    temporary.replace(path)
    _fsync(path.parent)  # or the name could be lost in a power cut


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder to fill; it replaces the folder `path` when the block ends well. Raises OSError.

    A folder cannot be renamed over a full one: a kill between the two renames leaves `.NAME.old`, which
    `recover_folder` puts back.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = _sibling(path, "new"), _sibling(path, "old")
    with _errors_name(path):
        shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
        new.mkdir()
        try:
            yield new
            for each in (*new.rglob("*"), new):
                _fsync(each)
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
    """Undo the first of the two renames of `atomic_folder`, where a kill came between them."""
    old = _sibling(path, "old")
    if old.exists() and not path.exists():
        old.rename(path)


def _sibling(path: Path, state: str) -> Path:
    return path.with_name(f".{path.name}.{state}")


@contextlib.contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """Have an OSError name a file: a full disk does not say where."""
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
