"""What is measured of one mask: discs with probabilities that a well-trained network would give them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import ndimage

from isicdist.audit.measures import Confidence, Measures, dice_of_masks, measure, probability_histograms

SIDE = 96
CONFIDENCE = Confidence(lesion=0.9, background=0.1)


def disc(row: float = 48, column: float = 48, radius: float = 20) -> np.ndarray:
    rows, columns = np.ogrid[:SIDE, :SIDE]
    return (rows - row) ** 2 + (columns - column) ** 2 <= radius**2


def levels_of(mask: np.ndarray, blur: float = 2.0) -> np.ndarray:
    """Probabilities of a network that knows the mask but for the sharpness of its outline."""
    return np.round(255 * ndimage.gaussian_filter(mask.astype(np.float32), blur)).astype(np.uint8)


def measured(mask: np.ndarray, blur: float = 2.0) -> Measures:
    return measure(mask, levels_of(disc(), blur), CONFIDENCE)


def test_a_right_mask_meets_what_is_expected():
    found = measured(disc())
    assert found.dice > 0.98
    assert found.error_ratio < 1
    assert found.contradiction == 0
    assert (found.hole_share, found.islet_share, found.shift) == (0, 0, (0, 0))
    assert found.lesion_area == pytest.approx(disc().mean())


def test_the_same_error_weighs_less_where_the_network_is_unsure():
    levels = levels_of(disc())
    hesitant = np.round(127 + (levels.astype(float) - 127) * 0.6).astype(np.uint8)  # the same prediction
    sure, unsure = (measure(disc(radius=26), each, CONFIDENCE) for each in (levels, hesitant))
    assert sure.dice == unsure.dice
    assert sure.error_ratio > 2 * unsure.error_ratio
    assert sure.contradiction > unsure.contradiction == 0


def test_a_missing_part_is_thick_and_a_wider_outline_thin():
    half = disc().copy()
    half[:, :48] = False
    wider, lacking = measured(disc(radius=23)), measured(half)
    assert lacking.contradiction > 5 * wider.contradiction
    assert lacking.missing_share == 1
    assert wider.missing_share == 0


def test_a_shifted_mask_fits_at_its_place():
    found = measured(disc(row=36, column=60))
    assert found.shifted_dice > 0.95 > 0.7 > found.dice
    assert found.shift == pytest.approx((12 / SIDE, -12 / SIDE), abs=1.5 / 64)
    assert found.shift_gain > 5
    assert measured(disc()).shift_gain < 1
    assert measured(disc(radius=3)).shift_gain == 0  # it fits nowhere


def test_a_mask_at_the_border_does_not_fit_around_the_corner():
    top, bottom = disc(row=8, radius=8), disc(row=88, radius=8)
    found = measure(top, levels_of(bottom), CONFIDENCE)
    assert found.shift == pytest.approx((80 / SIDE, 0), abs=1.5 / 64)


def test_inverted_and_ring_masks_are_recognised_and_a_tiny_one_is_not_inverted():
    assert measured(~disc()).inverted_dice > 0.95
    ring = disc() & ~disc(radius=16)
    found = measured(ring)
    assert found.hole_share == pytest.approx(0.64, abs=0.03)
    assert found.filled_dice > 0.98 > 0.6 > found.dice
    assert found.inverted_dice < 0.6
    assert measured(disc(row=10, column=10, radius=3)).inverted_dice < 0.3


def test_islets_are_what_lies_apart_from_the_largest_part():
    found = measured(disc() | disc(row=10, column=10, radius=5))
    assert found.islet_share == pytest.approx(25 / 425, abs=0.01)


@pytest.mark.parametrize("side", [16, 48, 100])
@pytest.mark.parametrize("kind", ["empty", "full"])
def test_empty_and_full_masks_of_any_size_give_finite_numbers(side, kind):
    mask = np.full((side, side), kind == "full")
    for levels in (np.zeros((side, side), np.uint8), np.full((side, side), 255, np.uint8)):
        found = measure(mask, levels, CONFIDENCE)
        numbers = [value for value in dataclasses.asdict(found).values() if isinstance(value, float)]
        assert all(np.isfinite(numbers))
    assert dice_of_masks(mask, mask) == 1


def test_confidence_is_the_mean_probability_of_each_label_and_never_crosses_a_half():
    mask = np.array([[True, True], [False, False]])
    counts = probability_histograms(mask, np.array([[255, 204], [51, 0]], np.uint8))
    assert counts.sum() == 4
    found = Confidence.of(counts)
    assert (found.lesion, found.background) == pytest.approx((0.9, 0.1))
    crossed = Confidence.of(probability_histograms(~mask, np.array([[255, 204], [51, 0]], np.uint8)))
    assert (crossed.lesion, crossed.background) == (0.5, 0.5)
    assert Confidence.of(np.zeros((2, 256), np.int64)) == Confidence(lesion=0.5, background=0.0)
