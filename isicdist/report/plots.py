"""Charts of the report, as SVG: learning, threshold and calibration curves, Dice per image, throughput.

Each chart is drawn for one run or for several, a line each. The same data gives the same bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from isicdist.report.collect import Evaluation, RunFiles

WIDTH, HEIGHT = 4.6, 2.9
"""Size of a chart in inches: at this size its text can be read on a phone."""
STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.alpha": 0.3,
    "svg.fonttype": "none",  # text stays text: small, sharp and searchable
    "svg.hashsalt": "isicdist",  # or element ids would be random
}
# Okabe and Ito's colours, which differ for every kind of colour vision, and a dash pattern each for print.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#56b4e9")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
MAX_POINTS = 1000
"""Points of a curve; longer logs are thinned evenly."""
CALIBRATION_BINS = 16
"""Points of a calibration curve: the 256 bins of thresholds.csv are pooled, because some of them are nearly empty."""
HISTOGRAM_BINS = 20


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One chart: its drawing and what it says in words."""

    title: str
    alt: str
    """Description for those who do not see it: the axes, and the ends or the extremes of each line."""
    svg: bytes


def learning_charts(runs: Sequence[RunFiles]) -> list[Chart]:
    """Draw training loss, Dice, learning rate and throughput by step."""
    loss = _chart(
        "Training loss",
        "step",
        "loss",
        {run.name: _train_curve(run, "loss") for run in runs},
    )

    def draw_dice(axes: Axes) -> None:
        for position, run in enumerate(runs):
            steps, values = _train_curve(run, "pooled_dice")
            axes.plot(steps, values, color=COLOURS[position % len(COLOURS)], alpha=0.35, linewidth=1)
            steps = [each.step for each in run.validations]
            values = [each.mean_dice for each in run.validations]
            axes.plot(steps, values, marker="o", markersize=3.5, label=_label(run.name), **_line(position))
        axes.set(xlabel="step", ylabel="Dice", ylim=(0, 1))

    validations = {run.name: _xy([(each.step, each.mean_dice) for each in run.validations]) for run in runs}
    alt = f"Mean Dice on the validation split by step: {_describe(validations)}. Pale: pooled Dice in training."
    dice = _draw("Validation Dice (pale: training)", alt, draw_dice, legend=len(runs) > 1)
    rate = _chart("Learning rate", "step", "learning rate", {run.name: _train_curve(run, "lr") for run in runs})
    speed = {run.name: _train_curve(run, "images_per_s") for run in runs}
    return [loss, dice, rate, _chart("Throughput", "step", "images/s", speed, from_zero=True)]


def threshold_chart(evaluations: Mapping[str, Evaluation]) -> Chart:
    """Draw pooled Dice by threshold, with a dot at the tuned threshold of each run; `evaluations` by run."""
    curves = {
        name: (each.thresholds["threshold"], each.thresholds["pooled_dice"]) for name, each in evaluations.items()
    }

    def draw(axes: Axes) -> None:
        for position, (name, (thresholds, dice)) in enumerate(curves.items()):
            axes.plot(thresholds, dice, label=_label(name), **_line(position))
            tuned = evaluations[name].summary.at_tuned.threshold
            axes.plot(tuned, np.interp(tuned, thresholds, dice), "o", color=COLOURS[position % len(COLOURS)])
        axes.set(xlabel="threshold of the probability", ylabel="pooled Dice", xlim=(0, 1), ylim=(0, 1))

    best = "; ".join(f"{name} at most {dice.max():.3f}" for name, (_, dice) in curves.items())
    alt = f"Pooled Dice by threshold, from 0 to 1: {best}. A dot marks the tuned threshold."
    return _draw("Dice by threshold (dot: tuned)", alt, draw, legend=len(curves) > 1)


def calibration_chart(evaluations: Mapping[str, Evaluation]) -> Chart:
    """Draw the calibration curve (reliability diagram): share of lesion by predicted probability."""
    curves = {name: calibration_curve(each.thresholds) for name, each in evaluations.items()}

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color="#767676", linewidth=1, label="calibrated")
        for position, (name, (probabilities, shares)) in enumerate(curves.items()):
            axes.plot(probabilities, shares, marker="o", markersize=3.5, label=_label(name), **_line(position))
        axes.set(xlabel="probability", ylabel="share of lesion", xlim=(0, 1), ylim=(0, 1))

    errors = "; ".join(
        f"{name} calibration error {each.summary.thresholds.calibration_error:.3f}"
        for name, each in evaluations.items()
    )
    alt = f"Share of lesion pixels by predicted probability; a calibrated model is on the diagonal: {errors}."
    return _draw("Calibration", alt, draw, legend=True)


def calibration_curve(thresholds: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Pool the bins of thresholds.csv: (mean probability, share of lesion), both (k,); empty bins are left out."""
    pixels, lesion = (thresholds[name].reshape(CALIBRATION_BINS, -1) for name in ("bin_pixels", "bin_lesion_pixels"))
    probabilities = thresholds["threshold"].reshape(pixels.shape) + 0.5 / pixels.size  # the middles of the fine bins
    total = pixels.sum(axis=1)
    used = total > 0
    return (probabilities * pixels).sum(axis=1)[used] / total[used], lesion.sum(axis=1)[used] / total[used]


def lesion_size_chart(evaluations: Mapping[str, Evaluation]) -> Chart:
    """Draw Dice of each image by the size of its lesion, a dot each, and the mean of each quarter of the images."""

    def draw(axes: Axes) -> None:
        for position, (name, evaluation) in enumerate(evaluations.items()):
            scores, colour = evaluation.per_image, COLOURS[position % len(COLOURS)]
            seen = scores.lesion_areas > 0  # a lesion-free image has no place on a logarithmic axis
            many = len(scores.keys) > MAX_POINTS
            axes.scatter(
                scores.lesion_areas[seen], scores.tuned_dice[seen], s=7, alpha=0.35, color=colour, rasterized=many
            )
            parts = [part for part in evaluation.summary.lesion_area_quartiles if part.largest_area > 0]
            middles = [math.sqrt(max(part.least_area, 1e-4) * part.largest_area) for part in parts]
            axes.plot(middles, [part.mean_dice for part in parts], marker="D", label=_label(name), **_line(position))
        axes.set(xlabel="lesion area, share of the image", ylabel="Dice", ylim=(0, 1), xscale="log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:.3g}")
        axes.xaxis.set_minor_formatter(NullFormatter())

    quartiles = "; ".join(
        f"{name} {', '.join(f'{part.mean_dice:.3f}' for part in each.summary.lesion_area_quartiles)}"
        for name, each in evaluations.items()
    )
    alt = f"Dice of each image by lesion area. Mean Dice of each quarter, from small to large lesions: {quartiles}."
    return _draw("Dice by lesion size (diamonds: mean of a quarter)", alt, draw, legend=len(evaluations) > 1)


def histogram_chart(evaluations: Mapping[str, Evaluation]) -> Chart:
    """Draw the distribution of the Dice of single images."""
    edges = np.linspace(0, 1, HISTOGRAM_BINS + 1)

    def draw(axes: Axes) -> None:
        for position, (name, evaluation) in enumerate(evaluations.items()):
            counts, _ = np.histogram(evaluation.per_image.tuned_dice, edges)
            colour = COLOURS[position % len(COLOURS)]
            axes.stairs(counts, edges, label=_label(name), color=colour, linestyle=DASHES[position % len(DASHES)])
            if len(evaluations) == 1:
                axes.stairs(counts, edges, color=colour, fill=True, alpha=0.25)
        axes.set(xlabel="Dice of an image", ylabel="images", xlim=(0, 1))

    quantiles = "; ".join(
        "{} 5 % {:.3f}, median {:.3f}, 95 % {:.3f}".format(
            name, *np.quantile(each.per_image.tuned_dice, (0.05, 0.5, 0.95))
        )
        for name, each in evaluations.items()
    )
    return _draw(
        "Dice of single images", f"Histogram of Dice over images: {quantiles}.", draw, legend=len(evaluations) > 1
    )


Curve = tuple[np.ndarray, np.ndarray]
"""x and y, float64 (k,) each; NaN where there is a gap."""


def _train_curve(run: RunFiles, name: str) -> Curve:
    steps = -(-len(run.train) // MAX_POINTS)
    return _xy([(each.step, getattr(each, name)) for each in run.train[::steps]])


def _xy(points: list[tuple[int, float]]) -> Curve:
    x, y = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return x, y


def _label(name: str) -> str:
    """Write a run's name so that matplotlib neither leaves it out of the legend (_name) nor reads a formula ($)."""
    return (" " * name.startswith("_") + name).replace("$", r"\$")


def _line(position: int) -> dict[str, Any]:
    """Give the colour and dashes of the run at this position."""
    return {
        "color": COLOURS[position % len(COLOURS)],
        "linestyle": DASHES[position % len(DASHES)],
        "linewidth": 1.5,
    }


def _chart(title: str, xlabel: str, ylabel: str, curves: Mapping[str, Curve], *, from_zero: bool = False) -> Chart:
    """Draw one line for each run."""

    def draw(axes: Axes) -> None:
        for position, (name, (x, y)) in enumerate(curves.items()):
            axes.plot(x, y, label=_label(name), **_line(position))
        axes.set(xlabel=xlabel, ylabel=ylabel)
        if from_zero:
            axes.set_ylim(bottom=0)

    return _draw(title, f"{title} by {xlabel}: {_describe(curves)}.", draw, legend=len(curves) > 1)


def _describe(curves: Mapping[str, Curve]) -> str:
    """Put the ends of each curve into words."""
    words: list[str] = []
    for name, (x, y) in curves.items():
        x, y = x[np.isfinite(y)], y[np.isfinite(y)]
        ends = f"from {y[0]:.4g} at {x[0]:.0f} to {y[-1]:.4g} at {x[-1]:.0f}" if len(y) else "no value"
        words.append(f"{name} {ends}")
    return "; ".join(words)


def _draw(title: str, alt: str, draw: Callable[[Axes], None], *, legend: bool) -> Chart:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        if legend:
            axes.legend(fontsize=8)
        svg = io.BytesIO()
        FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None})
    return Chart(title=title, alt=alt, svg=svg.getvalue())
