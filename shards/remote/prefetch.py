"""One pass over a split of a remote set: its shards are fetched before they are read, and let go afterwards."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from shards.errors import ToolkitError, UsageError
from shards.remote.cache import Copies, Entry

FETCHERS = 4  # threads of one process that fetch ahead


class Pass:
    """Which shards a pass has begun, finished, and will read next: a function of its order and its place in it."""

    def __init__(
        self, shards: np.ndarray, entries: Sequence[Entry], copies: Copies, let_go: Callable[[int], None]
    ) -> None:
        """`shards`: the shard of each sample in the order of the pass, int (n,), places in `entries`.

        `let_go` is called with each shard that is finished. Raises UsageError when the cache's limit is less than
        twice what is read at once: while one process has begun with the next shards, another may not be there yet.
        """
        found, first = np.unique(shards, return_index=True)
        last = len(shards) - 1 - np.unique(shards[::-1], return_index=True)[1]
        by_first = np.argsort(first)
        self._shards, self._first, self._last = found[by_first], first[by_first], last[by_first]
        self._entries = [entries[shard] for shard in self._shards]
        self._limit, self._let_go, self._ahead = copies.cache.limit, let_go, _Ahead(copies)
        self._todo, self._begun = np.ones(len(found), dtype=bool), False
        needed = 2 * self._most_at_once()
        if 0 < self._limit < needed:
            raise UsageError(
                f"stream.cache_size is {self._limit}: {copies.remote.location} needs {needed} bytes, twice what is "
                "read at once; give that much, or a smaller stream.window"
            )

    def at(self, place: int) -> None:
        """All samples before `place` are read. Cheap to call at every step; the first call begins the pass."""
        finished = self._todo & (self._last < place)
        if finished.any() or not self._begun:
            self._begun = True
            self._todo &= ~finished
            for shard in self._shards[finished]:
                self._let_go(int(shard))
            self._want()

    def _want(self) -> None:
        """Fetch what is next, as much of it as the cache holds."""
        entries = [self._entries[i] for i in np.flatnonzero(self._todo)]
        if self._limit:
            fit = np.cumsum([entry["bytes"] for entry in entries]) <= self._limit
            entries = entries[: int(fit.sum())]
        self._ahead.want(entries)

    def _most_at_once(self) -> int:
        """The most bytes of shards that are begun and not finished, over all places of the pass."""
        sizes = np.array([entry["bytes"] for entry in self._entries], dtype=np.int64)
        order = np.argsort(np.concatenate([self._last + 1, self._first]), kind="stable")
        return int(np.concatenate([-sizes, sizes])[order].cumsum().max(initial=0))


class _Ahead:
    """Fetches files in the background. Its threads live as long as there is something to fetch."""

    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        self._lock = threading.Lock()
        self._wanted: deque[Entry] = deque()
        self._keep: frozenset[Path] = frozenset()
        self._running = 0

    def want(self, entries: Sequence[Entry]) -> None:
        """From now on fetch these, in this order, in the place of what was wanted before."""
        with self._lock:
            self._wanted = deque(entries)
            self._keep = frozenset(self._copies.path(entry) for entry in entries)
            more = min(FETCHERS, len(entries)) - self._running
            for _ in range(more):
                self._running += 1
                # A daemon: the process may end while it fetches, and what it leaves does no harm.
                threading.Thread(target=self._fetch, name="fetch-ahead", daemon=True).start()

    def _fetch(self) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._running -= 1
                    return
                entry, keep = self._wanted.popleft(), self._keep
            try:
                fetched = self._copies.fetch(entry, keep=keep)
            except (ToolkitError, OSError):
                fetched = False  # the one that needs it will find out, and say so
            if not fetched:
                with self._lock:
                    self._wanted.clear()
