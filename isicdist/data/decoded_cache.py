"""Decoded cache: the decoded samples of a split in one memory-mapped file that all ranks of a node share.

The file has a record of equal length for each sample: a marker, the image (H, W, 3) and the mask (H, W), uint8. It is
created sparse and filled as samples are first read; from the second epoch on nothing is decoded. The processes share
its pages in the page cache.

A marker is the CRC-32 of the rest of its record, so that no locks are needed: a record that is missing, torn by a kill
or a full disk, or being written by another rank does not match its marker, and its sample is decoded.

Reading by mmap takes about half of the time of pread, but access to a page that the file does not have (truncated, or
a hole on a full disk) raises SIGBUS, which ends the process. So each process reads and verifies a record by pread once,
and by mmap from then on, as long as the file has its full size. On a network file system every read is by pread and
verified: nothing else notices what another machine does to the file, or what is lost when written pages are sent.

The folder of `auto` is local to the node (`shards.remote.cache_folder`). There a new file evicts files that no process
has open, the least recently used first. `auto` means "if possible": where the folder cannot be written or locked, a
line says so and every epoch decodes.
"""

from __future__ import annotations

import errno
import fcntl
import functools
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
from shards.remote.cache import evict
from shards.remote.cache_folder import node_local_root, on_network

_WRITTEN = 1 << 32  # bit of every marker, which distinguishes a record from a hole
_MARKER_BYTES = 8
SUFFIX = ".decoded"

MEMORY_SHARE = 4
"""`auto` caches a split whose decoded samples take at most 1/MEMORY_SHARE of the machine's memory."""
DISK_SHARE = 2
"""`auto` caches a split whose decoded samples take at most 1/DISK_SHARE of the free space on the disk."""


class DecodedCache:
    """Decoded samples of one split, all of one size. Any number of processes and threads may share its file."""

    def __init__(self, split: Split, folder: str | Path) -> None:
        """Open the file of `split` in `folder`, or create it.

        Raises OSError when it cannot be written there, UsageError for a split whose images differ in size.
        """
        size = split.size
        if size is None:
            raise UsageError(f"{split.root}: its images differ in size; build a set for training with --size N")
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.path = _path(split, folder)
        self._split = split
        self._record = record_bytes(size)
        self._bytes = len(split) * self._record
        self._verified = np.zeros(len(split), dtype=bool)  # records that this process reads by mmap from now on
        self._mappable = not on_network(self.path)
        self._write_failed, self._warn_lock = False, threading.Lock()
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        weakref.finalize(self, os.close, self._file)
        fcntl.flock(self._file, fcntl.LOCK_SH)  # `evict` skips a locked file
        os.utime(self._file)
        os.ftruncate(self._file, self._bytes)  # sparse: takes no space until it is filled
        record = [("marker", "<u8"), ("image", "u1", (size, size, 3)), ("mask", "u1", (size, size))]
        pages = mmap.mmap(self._file, self._bytes, access=mmap.ACCESS_READ) if self._mappable else b""
        mapped = np.frombuffer(pages, record)
        self._markers, self._images, self._masks = mapped["marker"], mapped["image"], mapped["mask"]

    @classmethod
    def open(cls, setting: str, split: Split) -> Self | None:
        """Open the cache by the setting `stream.decoded_cache`: off, auto or a folder.

        None for off, for images that differ in size, and for auto where the file would be too large or, with a
        warning, cannot be written. Raises OSError for a folder that cannot be written.
        """
        if setting == "off" or split.size is None:
            return None
        folder = node_local_root() / "decoded" if setting == "auto" else Path(setting)
        try:
            return cls(split, folder) if setting != "auto" or _make_room(split, folder) else None
        except OSError as error:
            reason = error.strerror or str(error)
            if setting != "auto":
                hint = "give another folder, auto or off (--stream.decoded-cache)"
                raise OSError(
                    error.errno, f"decoded samples cannot be cached here ({reason}); {hint}", setting
                ) from error
            _warn_once(f"{folder}: decoded samples cannot be cached there ({reason}); every epoch decodes them")
            return None

    def read(self, index: int, image: np.ndarray, mask: np.ndarray) -> None:
        """Read a sample into `image` (H, W, 3) and `mask` (H, W), uint8; decode it by `Split.sample` if not cached.

        Raises what `Split.sample` raises.
        """
        if not self._load(index, image, mask):
            self._split.sample(index, image, mask)
            self._store(index, image, mask)

    def _load(self, index: int, image: np.ndarray, mask: np.ndarray) -> bool:
        """Read a record; False if it is not there or not whole."""
        if self._verified[index] and os.fstat(self._file).st_size >= self._bytes and self._markers[index]:
            image[:], mask[:] = self._images[index], self._masks[index]
            return True
        marker = bytearray(_MARKER_BYTES)
        try:
            read = os.preadv(self._file, [marker, image.data, mask.data], index * self._record)
        except OSError:  # a disk or a server that fails: the sample itself can still be read
            return False
        whole = read == self._record and bytes(marker) == _marker(image, mask)
        self._verified[index] = whole and self._mappable
        return whole

    def _store(self, index: int, image: np.ndarray, mask: np.ndarray) -> None:
        """Write a record; where it fails (a full disk, a quota), warn once and stop writing."""
        if self._write_failed:
            return
        try:
            written = os.pwritev(self._file, [_marker(image, mask), image.data, mask.data], index * self._record)
            self._verified[index] = self._mappable and written == self._record
        except OSError as error:
            with self._warn_lock:
                warned, self._write_failed = self._write_failed, True
            if not warned:
                reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
                _warn_once(f"{self.path}: {reason}; the other samples are decoded each time")


@functools.cache
def _warn_once(text: str) -> None:
    """Print a warning on the first process of this machine, once although two splits or many threads meet its cause."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"warning: {text}", file=sys.stderr)


def record_bytes(size: int) -> int:
    """Compute the bytes of the record of a sample of `size` × `size` pixels."""
    return _MARKER_BYTES + 4 * size * size


def _make_room(split: Split, folder: Path) -> bool:
    """Check the limits of `auto`, and evict unused files where the disk is too full; False if it has to do without."""
    assert split.size is not None
    needed = len(split) * record_bytes(split.size)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory // MEMORY_SHARE:
        return False
    if _path(split, folder).exists():
        return True
    existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    unused = sorted(folder.glob(f"*{SUFFIX}"), key=_last_use, reverse=True)
    while needed > shutil.disk_usage(existing).free // DISK_SHARE:
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
    """Compute the marker of a record: the CRC-32 of its pixels and the bit of a written one."""
    return (_WRITTEN | isal_zlib.crc32(mask.data, isal_zlib.crc32(image.data))).to_bytes(_MARKER_BYTES, "little")
