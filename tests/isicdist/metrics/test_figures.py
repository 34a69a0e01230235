"""Curves of a run as they are drawn; the example images are tested with the evaluation, in test_evaluate.py."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from isicdist.metrics import figures
from isicdist.metrics.figures import draw_curves
from isicdist.metrics.thresholds import BINS, ThresholdCurve

TRAIN: list[dict[str, Any]] = [
    {"step": 1, "loss": None, "pooled_dice": 0.25},
    {"step": 2, "loss": 0.5, "pooled_dice": 0.75},
]
EVALUATIONS: list[dict[str, Any]] = [{"step": 2, "mean_dice": 0.5}]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    found: list[Figure] = []
    monkeypatch.setattr(figures, "_save", lambda figure, out: found.append(figure))
    return found


def test_learning_curves_have_a_gap_where_a_value_is_not_finite(drawn):
    draw_curves(TRAIN, EVALUATIONS, {}, Path("report.png"))
    loss, dice = drawn[0].axes
    np.testing.assert_array_equal(loss.lines[0].get_xydata(), [[1, math.nan], [2, 0.5]])
    assert [line.get_label() for line in dice.lines] == ["train, pooled", "validation, mean"]
    assert np.asarray(dice.lines[1].get_xydata()).tolist() == [[2, 0.5]]


def test_the_calibration_curve_is_the_share_of_lesion_by_probability(drawn):
    on, off = np.zeros(BINS, dtype=np.int64), np.zeros(BINS, dtype=np.int64)
    on[[0, 15, 255]] = 1, 2, 8
    off[[3, 255]] = 9, 8
    draw_curves(TRAIN, EVALUATIONS, {"test": ThresholdCurve(on=on, off=off).table()}, Path("report.png"))
    dice, calibration = drawn[0].axes[2:]
    assert len(np.asarray(dice.lines[0].get_xydata())) == BINS
    points = np.asarray(calibration.lines[0].get_xydata()).tolist()  # bins without a pixel are left out
    assert points == [[0.5 / 16, 3 / 12], [15.5 / 16, 8 / 16]]


def test_the_report_is_a_picture(tmp_path):
    draw_curves(TRAIN, [], {}, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
