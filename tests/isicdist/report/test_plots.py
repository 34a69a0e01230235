"""Charts: valid SVG with the curves' values and their words, the same for the same run."""

from __future__ import annotations

import math
from collections.abc import Callable
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from matplotlib.axes import Axes

from isicdist.metrics.thresholds import BINS, ThresholdCurve
from isicdist.report import plots
from isicdist.report.collect import RunFiles
from isicdist.report.plots import (
    calibration_chart,
    calibration_curve,
    histogram_chart,
    learning_charts,
    lesion_size_chart,
    threshold_chart,
)


def texts(svg: bytes) -> list[str]:
    return ["".join(element.itertext()) for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_learning_curves_have_a_gap_where_a_value_is_not_finite(run, monkeypatch):
    drawn: list[Axes] = []
    original = plots._draw

    def recorded(title: str, alt: str, draw: Callable[[Axes], None], *, legend: bool) -> plots.Chart:
        def draw_and_record(axes: Axes) -> None:
            draw(axes)
            drawn.append(axes)

        return original(title, alt, draw_and_record, legend=legend)

    monkeypatch.setattr(plots, "_draw", recorded)
    charts = learning_charts([RunFiles.read(run, name="run")])
    np.testing.assert_array_equal(drawn[0].lines[0].get_xydata(), [[1, math.nan], [2, 1 / 2], [3, 1 / 3]])
    np.testing.assert_array_equal(drawn[1].lines[1].get_xydata(), [[1, 0.25], [2, 0.75], [3, 0.625]])
    assert charts[0].title == "Training loss"
    assert charts[0].alt == "Training loss by step: run from 0.5 at 2 to 0.3333 at 3."


def test_a_chart_of_several_runs_has_a_legend_and_one_of_a_single_run_has_none(run, make_run):
    runs = RunFiles.read_all([run, make_run(run.parent / "other")])
    for chart in learning_charts(runs):
        assert {"run", "other"} <= set(texts(chart.svg))
        assert "other from" in chart.alt
    for chart in learning_charts(runs[:1]):
        assert "run" not in texts(chart.svg)


def test_any_name_of_a_run_is_in_the_legend(run, make_run):
    runs = RunFiles.read_all([make_run(run.parent / name) for name in ("_a", "b$_$c")])
    for chart in learning_charts(runs):
        assert {"_a", "b$_$c"} <= {text.strip() for text in texts(chart.svg)}


def test_a_long_log_is_thinned(run, monkeypatch):
    monkeypatch.setattr(plots, "MAX_POINTS", 2)
    assert "from 0.3333 at 3 to 0.3333 at 3" in learning_charts([RunFiles.read(run, name="run")])[0].alt


def test_a_run_without_a_validation_has_charts(run):
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if '"train"' in line))
    assert "run no value" in learning_charts([RunFiles.read(run, name="run")])[1].alt


def test_the_calibration_curve_is_the_share_of_lesion_by_probability():
    on, off = np.zeros(BINS, dtype=np.int64), np.zeros(BINS, dtype=np.int64)
    on[[0, 15, 255]] = 1, 2, 8
    off[[3, 255]] = 9, 8
    rows = ThresholdCurve(on=on, off=off).table()
    probabilities, shares = calibration_curve({name: np.array([row[name] for row in rows]) for name in rows[0]})
    # Bins without a pixel are left out; a point is at the mean probability of its pixels.
    assert probabilities == pytest.approx([(1 * 0.5 + 9 * 3.5 + 2 * 15.5) / 12 / 256, 255.5 / 256])
    assert shares.tolist() == [3 / 12, 8 / 16]


@pytest.mark.parametrize("draw", [threshold_chart, calibration_chart, histogram_chart, lesion_size_chart])
def test_the_charts_of_an_evaluation_say_their_numbers_and_are_reproducible(evaluated_runs, draw):
    runs = RunFiles.read_all(evaluated_runs)
    evaluations = {run.name: run.evaluations["test"] for run in runs}
    chart = draw(evaluations)
    assert set(evaluations) <= set(texts(chart.svg))
    assert all(f"{name} " in chart.alt for name in evaluations)
    assert draw(evaluations) == chart
    assert f"{evaluations['first'].summary.thresholds.best_pooled_dice:.3f}" in threshold_chart(evaluations).alt
