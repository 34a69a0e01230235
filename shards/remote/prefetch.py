"""Prefetch the shards of one pass over a remote split, and release them when they have been read."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from shards.errors import ToolkitError, UsageError
from shards.format import FileEntry
from shards.remote.cache import CachedSet

DOWNLOAD_THREADS = 4  # of one process


class ShardPrefetcher:
    """Decides which shards to download and which to release, from the sample order and the current position."""

    def __init__(
        self,
        shards: np.ndarray,
        entries: Sequence[FileEntry],
        cached_set: CachedSet,
        release: Callable[[int], None],
    ) -> None:
        """Plan a pass. `shards`: the shard of each sample in the order of the pass, int (n,), positions in `entries`.

        `release` is called with each shard that is finished. Raises UsageError when the cache's limit is less than
        twice the shards that are open at once: one process may open the next ones before another has finished.
        """
        found, first = np.unique(shards, return_index=True)
        last = len(shards) - 1 - np.unique(shards[::-1], return_index=True)[1]
        by_first = np.argsort(first)
        # The distinct shards in the order of their first sample, with the positions of their first and last samples.
        self._shards, self._first, self._last = found[by_first], first[by_first], last[by_first]
        self._entries = [entries[int(shard)] for shard in self._shards]
        self._max_bytes, self._release = cached_set.cache.max_bytes, release
        self._downloader = _Downloader(cached_set)
        self._pending, self._started = np.ones(len(found), dtype=bool), False
        needed = 2 * self._max_open_bytes()
        if 0 < self._max_bytes < needed:
            raise UsageError(
                f"stream.cache_size is {self._max_bytes}: {cached_set.remote.location} needs {needed} bytes, twice "
                "what is read at once; give that much, or a smaller stream.window"
            )

    def advance(self, position: int) -> None:
        """Release the shards whose samples all lie before `position`, and schedule the next ones for download.

        Cheap enough to call at every step; the first call starts the pass.
        """
        finished = self._pending & (self._last < position)
        if finished.any() or not self._started:
            self._started = True
            self._pending &= ~finished
            for shard in self._shards[finished]:
                self._release(int(shard))
            self._schedule()

    def _schedule(self) -> None:
        """Schedule the pending shards, as many as the cache holds."""
        entries = [self._entries[i] for i in np.flatnonzero(self._pending)]
        if self._max_bytes:
            fits = np.cumsum([entry.bytes for entry in entries]) <= self._max_bytes
            entries = entries[: int(fits.sum())]
        self._downloader.schedule(entries)

    def _max_open_bytes(self) -> int:
        """Maximum over all positions of the bytes of the shards that are begun and not finished."""
        sizes = np.array([entry.bytes for entry in self._entries], dtype=np.int64)
        order = np.argsort(np.concatenate([self._last + 1, self._first]), kind="stable")
        return int(np.concatenate([-sizes, sizes])[order].cumsum().max(initial=0))


class _Downloader:
    """Downloads files on background threads, which end when nothing is scheduled any more."""

    def __init__(self, cached_set: CachedSet) -> None:
        self._cached_set = cached_set
        self._lock = threading.Lock()
        self._scheduled: deque[FileEntry] = deque()
        self._protected: frozenset[Path] = frozenset()
        self._running = 0

    def schedule(self, entries: Sequence[FileEntry]) -> None:
        """Download these files, in this order; replaces what was scheduled before."""
        with self._lock:
            self._scheduled = deque(entries)
            self._protected = frozenset(self._cached_set.path(entry) for entry in entries)
            for _ in range(min(DOWNLOAD_THREADS, len(entries)) - self._running):
                self._running += 1
                # A daemon: the process may end during a download, and the unfinished file does no harm.
                threading.Thread(target=self._run, name="prefetch", daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._scheduled:
                    self._running -= 1
                    return
                entry, protected = self._scheduled.popleft(), self._protected
            try:
                downloaded = self._cached_set.download(entry, protected=protected)
            except (ToolkitError, OSError):
                downloaded = False  # the reader of this shard will try again and raise the error
            if not downloaded:
                with self._lock:
                    self._scheduled.clear()
