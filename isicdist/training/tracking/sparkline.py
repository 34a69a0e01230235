"""Sparkline: a curve of one row of characters, over all values so far, in bounded memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII_RAMP = "_.-~=+*#"
"""Levels from low to high, for a terminal whose encoding lacks BLOCKS."""


class Curve:
    """History of one metric: at most `capacity` points, equally spaced; each is the mean of `stride` values."""

    def __init__(self, capacity: int = 1024) -> None:
        """Start without a value. `capacity`: an even number of points."""
        self._capacity, self._stride = capacity, 1
        self._points: list[float] = []
        self._pending: list[float] = []
        self.last = math.nan
        """Value added last; NaN before the first."""

    def add(self, value: float) -> None:
        """Append a value; NaN and infinity are gaps in the curve."""
        self.last = value
        self._pending.append(value)
        if len(self._pending) < self._stride:
            return
        self._points.append(_mean(self._pending))
        self._pending.clear()
        if len(self._points) == self._capacity:
            self._points = _buckets(self._points, self._capacity // 2)
            self._stride *= 2

    def sparkline(self, width: int, levels: str = BLOCKS) -> str:
        """Draw the history in at most `width` characters, from its minimum (lowest level) to its maximum."""
        points = self._points + ([_mean(self._pending)] if self._pending else [])
        points = _buckets(points, min(width, len(points)))
        finite = [point for point in points if math.isfinite(point)]
        low, high = min(finite, default=0), max(finite, default=0)
        scale = (len(levels) - 1) / (high - low) if high > low else 0
        return "".join(levels[round((point - low) * scale)] if math.isfinite(point) else " " for point in points)


def _buckets(values: Sequence[float], number: int) -> list[float]:
    """Average neighbouring values into `number` buckets, which differ in size by at most one value."""
    edges = [len(values) * index // number for index in range(number + 1)] if number else []
    return [_mean(values[start:stop]) for start, stop in itertools.pairwise(edges)]


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
