"""What a person looks at: image | ground truth | prediction side by side, and the curves of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

from isicdist.dice import DiceSummary, per_image_scores
from isicdist.predict import probabilities
from shards.reader import Split

EXAMPLES = 6
CONTOUR = "#00e5ff"


def draw_examples(
    model: nn.Module, card: dict[str, Any], split: Split, summary: DiceSummary, out: Path, device: torch.device
) -> None:
    """A picture of several images from the worst to the best by Dice: image | ground truth | prediction."""
    dice, _ = per_image_scores(summary.rows)
    ranked = np.argsort(dice, kind="stable")
    chosen = ranked[np.unique(np.linspace(0, len(ranked) - 1, EXAMPLES).round().astype(int))]
    numbers = summary.rows[chosen, 0].tolist()
    images = np.stack([split.image(number) for number in numbers])  # (N, H, W, 3)
    probs = probabilities(model, images, card, device)

    figure = Figure(figsize=(6.6, 2.2 * len(numbers)), layout="constrained")
    axes = figure.subplots(len(numbers), 3, squeeze=False)
    for row, (number, image, prob) in enumerate(zip(numbers, images, probs, strict=True)):
        mask, prediction = split.mask(number), prob > card["threshold"]
        shown = (image, _outlined(image, mask), _outlined(image, prediction))
        titles = (split.key(number), "ground truth", f"prediction, Dice {dice[chosen[row]]:.3f}")
        for axis, picture, title in zip(axes[row], shown, titles, strict=True):
            axis.imshow(picture)
            axis.set_title(title, fontsize=8)
            axis.set_axis_off()
    FigureCanvasAgg(figure)
    figure.savefig(out, dpi=110)


def draw_curves(train: list[dict[str, Any]], evaluations: list[dict[str, Any]], out: Path) -> None:
    """The loss and the Dice of a run over its steps."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [event["step"] for event in train]
    left.plot(steps, [_number(event["loss"]) for event in train])
    left.set(xlabel="step", ylabel="training loss")
    right.plot(steps, [_number(event["pooled_dice"]) for event in train], label="train, pooled", alpha=0.6)
    right.plot(
        [event["step"] for event in evaluations],
        [_number(event["mean_dice"]) for event in evaluations],
        "o-",
        label="validation, mean",
    )
    right.set(xlabel="step", ylabel="Dice", ylim=(0, 1))
    right.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3)
    FigureCanvasAgg(figure)
    figure.savefig(out, dpi=110)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _outlined(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """`image` (H, W, 3), darker outside of `mask` (H, W), with the mask's border drawn on it."""
    inside = mask.astype(bool)
    padded = np.pad(inside, 1)
    core = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    out = np.where(inside[..., None], image, image // 2)
    out[inside & ~core] = tuple(int(CONTOUR[i : i + 2], 16) for i in (1, 3, 5))
    return out
