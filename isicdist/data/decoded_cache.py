"""The decoded cache: the samples of a split as they are once decoded, in one file that all ranks of a node share.

The file has a record of equal length for each sample: a marker, the image (H, W, 3) and the mask (H, W), uint8. It
begins as one hole and is filled as samples are first read; from the second epoch on no codec runs. What is shared is
the page cache.

A marker is the CRC-32 of what follows it, so nothing has to be agreed on: a record that is missing, torn by a kill or
a full disk, or still being written by another rank has not the marker it should, and its sample is decoded.

Reading by a map takes about half of the time of reading the file, but to touch what is not there (cut off, or on a
full disk) kills the process. So a process reads and checks a record from the file once, and only then by the map, and
only while the file has its size.

In the folder of `auto`, files that no process has open make room for a new one, the oldest first.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
import sys
import threading
import weakref
from pathlib import Path
from typing import Self

import numpy as np
from isal import isal_zlib

from shards.errors import UsageError
from shards.reader import Split
from shards.remote.cache import cache_root, evict

_WRITTEN = 1 << 32  # in every marker, so that a hole has none
_MARKER_BYTES = 8
SUFFIX = ".decoded"

MEMORY_SHARE = 4
"""`auto` keeps decoded samples that take at most one of so many parts of the machine's memory,"""
DISK_SHARE = 2
"""and at most one of so many parts of what is free on the disk."""


class DecodedCache:
    """The decoded samples of one split of a set of one size. Any number of processes and threads may share a file."""

    def __init__(self, split: Split, folder: str | Path) -> None:
        """Open the file for `split` in `folder`, or begin it. Raises OSError when it cannot be written there."""
        size = split.size
        if size is None:
            raise UsageError(f"{split.root}: its images differ in size; build a set for training with --size N")
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.path = _path(split, folder)
        self._split = split
        self._record = record_bytes(size)
        self._bytes = len(split) * self._record
        self._right = np.zeros(len(split), dtype=bool)  # the records whose marker this process has found to fit
        self._full, self._saying = False, threading.Lock()
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        weakref.finalize(self, os.close, self._file)
        fcntl.flock(self._file, fcntl.LOCK_SH)  # nobody evicts it now
        os.utime(self._file)
        os.ftruncate(self._file, self._bytes)  # a hole: takes no room until it is filled
        kind = [("marker", "<u8"), ("image", "u1", (size, size, 3)), ("mask", "u1", (size, size))]
        mapped = np.frombuffer(mmap.mmap(self._file, self._bytes, access=mmap.ACCESS_READ), kind)
        self._markers, self._images, self._masks = mapped["marker"], mapped["image"], mapped["mask"]

    @classmethod
    def open(cls, where: str, split: Split) -> Self | None:
        """The cache that `--stream.decoded-cache` asks for: None for off, and for auto where it is too large."""
        if where == "off" or split.size is None:
            return None
        if where != "auto":
            return cls(split, where)
        folder = cache_root() / "decoded"
        return cls(split, folder) if _fits_comfortably(split, folder) else None

    def read(self, number: int, image: np.ndarray, mask: np.ndarray) -> None:
        """A sample into an image (H, W, 3) and a mask (H, W), as `Split.sample`, which is asked at the first time."""
        if not self._load(number, image, mask):
            self._split.sample(number, image, mask)
            self._store(number, image, mask)

    def _load(self, number: int, image: np.ndarray, mask: np.ndarray) -> bool:
        if self._right[number] and os.fstat(self._file).st_size >= self._bytes and self._markers[number]:
            image[:], mask[:] = self._images[number], self._masks[number]
            return True
        marker = bytearray(_MARKER_BYTES)
        got = os.preadv(self._file, [marker, image.data, mask.data], number * self._record)
        self._right[number] = got == self._record and marker == _marker(image, mask)
        return bool(self._right[number])

    def _store(self, number: int, image: np.ndarray, mask: np.ndarray) -> None:
        if self._full:
            return
        try:
            put = os.pwritev(self._file, [_marker(image, mask), image.data, mask.data], number * self._record)
            self._right[number] = put == self._record
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            with self._saying:
                said, self._full = self._full, True
            if not said:
                line = f"warning: {self.path}: the disk is full; the other samples are decoded each time"
                print(line, file=sys.stderr)


def record_bytes(size: int) -> int:
    """The bytes that a decoded sample of `size` x `size` pixels takes."""
    return _MARKER_BYTES + 4 * size * size


def _fits_comfortably(split: Split, folder: Path) -> bool:
    """Whether the file of `split` is there or has room; older files that nobody uses are removed for it."""
    assert split.size is not None
    needed = len(split) * record_bytes(split.size)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory // MEMORY_SHARE:
        return False
    own = _path(split, folder)
    if own.exists():
        return True
    there = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    unused = sorted(folder.glob(f"*{SUFFIX}"), key=_last_use, reverse=True)
    while needed > shutil.disk_usage(there).free // DISK_SHARE:
        if not unused:
            return False
        evict(unused.pop())
    return True


def _last_use(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:  # another rank has just evicted it
        return 0


def _path(split: Split, folder: str | Path) -> Path:
    return Path(folder) / f"{split.digest[:32]}-{split.name}{SUFFIX}"


def _marker(image: np.ndarray, mask: np.ndarray) -> bytes:
    return (_WRITTEN | isal_zlib.crc32(mask.data, isal_zlib.crc32(image.data))).to_bytes(_MARKER_BYTES, "little")
