"""A file under its final name is whole, however the process ends."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def publish(path: Path, data: bytes) -> None:
    """Give `path` this content, or leave it as it was: temporary name beside it, flush, fsync, rename."""
    with published(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def published(path: Path) -> Iterator[Path]:
    """A path to write to, whose file takes the place of `path` once it is on the disk, or goes if that fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk does not say where
        raise
