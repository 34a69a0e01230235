"""The figure of an evaluation: a row each of the worst, median and best images, with both outlines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from isicdist.metrics import figures
from isicdist.metrics.examples import PREDICTION_COLOUR, TRUTH_COLOUR, Example
from isicdist.metrics.figures import draw_examples

SIDE = 16


def example(group: str, key: str, dice: float) -> Example:
    """Make an example whose ground truth is a square and whose prediction is empty."""
    mask = np.zeros((SIDE, SIDE), bool)
    mask[4:9, 4:9] = True
    return Example(
        group=group,
        key=key,
        dice=dice,
        lesion_area=float(mask.mean()),
        aspect_ratio=1.0,
        image=np.full((SIDE, SIDE, 3), 128, np.uint8),
        mask=mask,
        prediction=~mask if group == "worst" else np.zeros_like(mask),
    )


EXAMPLES = [
    example(group, f"{group}{column}", column / 8) for group in ("worst", "median", "best") for column in (1, 2)
]


def test_each_group_is_a_row_with_outlines_of_truth_and_prediction(monkeypatch: pytest.MonkeyPatch):
    drawn: list[Figure] = []
    monkeypatch.setattr(figures, "_save", lambda figure, out: drawn.append(figure))
    draw_examples(EXAMPLES, Path("examples.png"))
    axes = drawn[0].axes
    assert [axis.get_title() for axis in axes] == [f"{each.key}\nDice {each.dice:.3f}" for each in EXAMPLES]
    assert [axis.get_ylabel() for axis in axes] == ["worst", "", "median", "", "best", ""]
    for axis in axes:
        (picture,) = (np.asarray(layer.get_array()) for layer in axis.images)
        colours = [f"#{pixel.tobytes().hex()}" for pixel in picture.reshape(-1, 3)]
        assert colours.count(TRUTH_COLOUR) == 5 * 5 - 3 * 3  # the outline alone
        # The first row's prediction reaches the edge of the image, which bounds it; the others are empty.
        assert (colours[0] == PREDICTION_COLOUR) == axis.get_title().startswith("worst")


def test_the_figure_is_a_png(tmp_path):
    draw_examples(EXAMPLES, tmp_path / "examples.png")
    with Image.open(tmp_path / "examples.png") as picture:
        assert picture.format == "PNG"
        assert picture.height > picture.width  # three rows of two
