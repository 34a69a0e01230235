"""wandb's objects of one evaluation: threshold curve, histogram of Dice, table of the worst images, pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import wandb

from isicdist.metrics.examples import Example
from isicdist.metrics.thresholds import ThresholdCurve
from isicdist.training.tracking.client import CURVE_STRIDE, HISTOGRAM_BINS
from isicdist.training.tracking.events import EvaluationDetails

CLASS_LABELS = {1: "lesion"}
WORST = "worst"
"""Group of examples that the table lists."""


def media(details: EvaluationDetails) -> dict[str, Any]:
    """Make the objects by name: threshold_curve, dice_histogram, worst_table, and GROUP_images of each group."""
    groups = details.grouped()
    made: dict[str, Any] = {
        "threshold_curve": threshold_curve(details.curve),
        "dice_histogram": wandb.Histogram(np_histogram=np.histogram(details.dice, HISTOGRAM_BINS)),
    }
    if WORST in groups:
        made["worst_table"] = table(groups[WORST])
    for group, examples in groups.items():
        made[f"{group}_images"] = [picture(example) for example in examples]
    return made


def threshold_curve(curve: ThresholdCurve) -> Any:
    """Draw pooled Dice, precision and recall over the threshold."""
    lines = {"pooled Dice": curve.dice, "precision": curve.precision, "recall": curve.recall}
    return wandb.plot.line_series(
        xs=(np.arange(len(curve.dice)) / len(curve.dice))[::CURVE_STRIDE].tolist(),
        ys=[values[::CURVE_STRIDE].tolist() for values in lines.values()],
        keys=list(lines),
        title="scores by threshold",
        xname="threshold",
    )


def table(examples: list[Example]) -> wandb.Table:
    """List examples with key, Dice, Jaccard, lesion area and picture."""
    rows = [
        [each.key, each.dice, each.dice / (2 - each.dice), each.lesion_area, picture(each)]  # Jaccard = D / (2 - D)
        for each in examples
    ]
    return wandb.Table(columns=["key", "dice", "jaccard", "lesion_area", "picture"], data=rows)


def picture(example: Example) -> wandb.Image:
    """Show an image with ground truth and prediction as overlays that can be toggled."""
    masks = {
        name: {"mask_data": mask.astype(np.uint8), "class_labels": CLASS_LABELS}
        for name, mask in (("ground_truth", example.mask), ("prediction", example.prediction))
    }
    return wandb.Image(
        example.image,
        caption=example.caption,
        masks=masks,  # pyright: ignore[reportArgumentType]
        file_type="jpg",
    )
