"""Sparklines: scale, width and bounded memory."""

from __future__ import annotations

import math

import pytest

from isicdist.training.tracking.sparkline import ASCII_RAMP, BLOCKS, Curve


def curve_of(values: list[float], capacity: int = 1024) -> Curve:
    curve = Curve(capacity)
    for value in values:
        curve.add(value)
    return curve


@pytest.mark.parametrize(
    ("values", "width", "drawn"),
    [
        ([], 10, ""),
        ([0.5], 10, "▁"),
        ([1.0, 1.0], 10, "▁▁"),
        ([0, 1, 2, 3, 4, 5, 6, 7], 8, BLOCKS),
        ([7, 7, 0, 0], 2, "█▁"),
        ([0, math.nan, math.inf, 7], 4, "▁  █"),
        ([0, 7], 0, ""),
    ],
)
def test_the_curve_spans_the_levels_and_leaves_gaps_for_what_is_not_finite(values, width, drawn):
    assert curve_of(values).sparkline(width) == drawn


def test_a_long_run_takes_bounded_memory_and_keeps_its_shape():
    curve = curve_of([float(step) for step in range(1001)], capacity=16)
    assert curve.sparkline(8, ASCII_RAMP) == ASCII_RAMP
    assert len(curve._points) < 16
    assert curve.last == 1000
