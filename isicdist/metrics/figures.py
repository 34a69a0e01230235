"""What a person looks at: the worst, the median and the best images of an evaluation, and the curves of a run."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from isicdist.metrics.dice import per_image_scores
from isicdist.metrics.results import Results
from shards.files import write_file
from shards.geometry import mask_outline

EXAMPLES = 4
"""Images of each kind."""
TRUTH, PREDICTION = "#ffe600", "#00e5ff"
OUTLINE_SHARE = 1 / 128
"""Width of an outline, as a share of the image's longer side."""
CALIBRATION_BINS = 16


@torch.inference_mode()
def draw_examples(predictor: Callable[[Tensor], Tensor], results: Results, out: Path, device: torch.device) -> None:
    """The worst, the median and the best images by Dice, each with the contours of truth and prediction.

    `predictor` gives probabilities (B, 1, H, W) of images (B, 3, H, W) uint8. Dice and prediction are those of the
    model's own threshold; of a set with less than twelve images, fewer are shown.
    """
    split, rows = results.split, results.own.finest.rows
    dice, _ = per_image_scores(rows)
    ranked = np.argsort(dice, kind="stable")
    shown = max(1, min(EXAMPLES, len(ranked) // 3))
    middle = (len(ranked) - shown) // 2
    kinds = {"worst": ranked[:shown], "median": ranked[middle : middle + shown], "best": ranked[-shown:]}

    figure = Figure(figsize=(2.2 * shown + 0.4, 7.6), layout="constrained")
    axes = figure.subplots(len(kinds), shown, squeeze=False)
    for line, (kind, places) in zip(axes, kinds.items(), strict=True):
        numbers = rows[places, 0].tolist()
        images = np.stack([split.image(number) for number in numbers])  # (N, H, W, 3)
        probs = predictor(torch.from_numpy(images).to(device).permute(0, 3, 1, 2))[:, 0].cpu().numpy()  # (N, H, W)
        for axis, place, number, image, prob in zip(line, places, numbers, images, probs, strict=True):
            axis.imshow(image)
            _contour(axis, split.mask(number), TRUTH)
            _contour(axis, prob > results.own.threshold, PREDICTION)
            axis.set_title(f"{split.key(number)}\nDice {dice[place]:.3f}", fontsize=8)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(kind)
    lines = [Line2D([], [], color=colour) for colour in (TRUTH, PREDICTION)]
    figure.legend(lines, ["ground truth", "prediction"], loc="outside lower center", ncols=2, facecolor="#8a6a5c")
    _save(figure, out)


def draw_curves(
    train: list[dict[str, Any]],
    evaluations: list[dict[str, Any]],
    thresholds: Mapping[str, list[dict[str, float]]],
    out: Path,
) -> None:
    """The loss and the Dice of a run over its steps; of each split that was scored, Dice by threshold and calibration.

    `thresholds`: the rows of thresholds.csv by split.
    """
    figure = Figure(figsize=(9, 6.8 if thresholds else 3.4), layout="constrained")
    axes = figure.subplots(2 if thresholds else 1, 2, squeeze=False)
    steps = [event["step"] for event in train]
    axes[0, 0].plot(steps, [_number(event["loss"]) for event in train])
    axes[0, 0].set(xlabel="step", ylabel="training loss")
    axes[0, 1].plot(steps, [_number(event["pooled_dice"]) for event in train], label="train, pooled", alpha=0.6)
    axes[0, 1].plot(
        [event["step"] for event in evaluations],
        [_number(event["mean_dice"]) for event in evaluations],
        "o-",
        label="validation, mean",
    )
    axes[0, 1].set(xlabel="step", ylabel="Dice", ylim=(0, 1))
    for split, rows in thresholds.items():
        columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
        axes[1, 0].plot(columns["threshold"], columns["pooled_dice"], label=split)
        pixels, lesion = (
            columns[name].reshape(CALIBRATION_BINS, -1).sum(axis=1) for name in ("bin_pixels", "bin_lesion_pixels")
        )
        middles = (np.arange(CALIBRATION_BINS) + 0.5) / CALIBRATION_BINS
        axes[1, 1].plot(middles[pixels > 0], lesion[pixels > 0] / pixels[pixels > 0], "o-", label=split)
    if thresholds:
        axes[1, 0].set(xlabel="threshold of the probability", ylabel="pooled Dice", xlim=(0, 1), ylim=(0, 1))
        axes[1, 1].plot([0, 1], [0, 1], "--", color="grey", label="calibrated")
        axes[1, 1].set(xlabel="probability", ylabel="share of lesion", xlim=(0, 1), ylim=(0, 1))
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    _save(figure, out)


def _contour(axis: Axes, mask: np.ndarray, colour: str) -> None:
    """Draw the outline of `mask` (H, W), also where it runs along the image's edge."""
    layer = np.zeros((*mask.shape, 4))  # RGBA, transparent
    layer[mask_outline(mask > 0, max(1, round(max(mask.shape) * OUTLINE_SHARE)))] = to_rgba(colour)
    axis.imshow(layer)


def _save(figure: Figure, out: Path) -> None:
    FigureCanvasAgg(figure)
    png = io.BytesIO()
    figure.savefig(png, dpi=110)
    write_file(out, png.getvalue())


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
