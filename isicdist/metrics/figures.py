"""Figure of an evaluation: the worst, median and best images with the outlines of ground truth and prediction."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from isicdist.metrics.examples import PREDICTION_COLOUR, TRUTH_COLOUR, Example
from shards.files import write_file


def draw_examples(examples: Sequence[Example], out: Path) -> None:
    """Draw the worst, median and best images, a row each, with the outlines of ground truth and prediction."""
    rows = {group: [each for each in examples if each.group == group] for group in ("worst", "median", "best")}
    columns = max(map(len, rows.values()))
    figure = Figure(figsize=(2.2 * columns + 0.4, 7.6), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes, (group, row) in zip(grid, rows.items(), strict=True):
        for axis, example in zip(axes, row, strict=True):
            axis.imshow(example.outlined())
            axis.set_title(f"{example.key}\nDice {example.dice:.3f}", fontsize=8)
            height, width = example.mask.shape
            axis.set(xticks=[], yticks=[], aspect=width / height / example.aspect_ratio)
        axes[0].set_ylabel(group)
    lines = [Line2D([], [], color=colour) for colour in (TRUTH_COLOUR, PREDICTION_COLOUR)]
    figure.legend(lines, ["ground truth", "prediction"], loc="outside lower center", ncols=2, facecolor="#8a6a5c")
    _save(figure, out)


def _save(figure: Figure, out: Path) -> None:
    FigureCanvasAgg(figure)
    png = io.BytesIO()
    figure.savefig(png, dpi=110)
    write_file(out, png.getvalue())
