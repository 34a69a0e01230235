"""Picture of one example for dashboards without overlays of their own: the outlines are drawn into the image."""

from __future__ import annotations

import numpy as np

from isicdist.metrics.examples import Example
from shards.geometry import mask_outline

TRUTH_COLOUR, PREDICTION_COLOUR = (255, 230, 0), (0, 229, 255)
"""RGB of the outlines of ground truth and prediction."""
OUTLINE_SHARE = 1 / 128
"""Width of an outline, as a share of the image's longer side."""


def draw_outlines(example: Example) -> np.ndarray:
    """Draw the outlines of ground truth and prediction into a copy of the image, (H, W, 3) uint8."""
    picture = example.image.copy()
    width = max(1, round(max(example.mask.shape) * OUTLINE_SHARE))
    for mask, colour in ((example.mask, TRUTH_COLOUR), (example.prediction, PREDICTION_COLOUR)):
        picture[mask_outline(mask, width)] = colour
    return picture


def caption(example: Example) -> str:
    """Name an example and its score in one line."""
    return f"{example.key}  Dice {example.dice:.3f}"
