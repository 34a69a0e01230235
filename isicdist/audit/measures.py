"""Measures of one mask against the probabilities of a model that has not seen it: pure functions of two arrays.

A model errs most where lesions are hard to see, so that a low Dice alone says little about the mask. Three measures
compare the mask with how sure the model is:

- the error ratio: the Dice error of the mask, over that which the probabilities expect of a right one;
- the contradiction: the inscribed radius of the widest region where a confident probability says the opposite of the
  mask, over the radius of the lesion. Annotators differ along outlines, which is thin; a missing part is thick;
- the shift gain: the Dice error of the mask where it lies, over that where it fits best.

Confident is what it is in confident learning (Northcutt et al., Journal of Artificial Intelligence Research 70, 2021):
a probability above the mean that the pixels of that label have over the whole set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from scipy import ndimage

from isicdist.metrics.dice import DEFAULT_THRESHOLD, dice_of

ERROR_FLOOR = 0.02
"""Added to the expected Dice error: outlines drawn twice by one person differ by about as much."""
SHIFT_ERROR_FLOOR = 0.05
MIN_SHIFTED_DICE = 0.7
"""Dice at its best place below which a mask is not taken for a shifted one."""
GRID = 64
"""Side of the grid that shifts are tried on."""
THUMBNAIL = 32
"""Side of the grid that masks and predictions of different images are compared on."""


@dataclass(frozen=True, kw_only=True)
class Confidence:
    """Probabilities from which on the model counts as sure, over one set."""

    lesion: float
    """Mean probability of the pixels inside of masks: at or above it the model is sure of lesion."""
    background: float
    """Mean probability of the pixels outside: at or below it the model is sure of background."""

    @classmethod
    def of(cls, histograms: np.ndarray) -> Self:
        """Compute both from `probability_histograms` summed over a set."""
        centres = np.arange(histograms.shape[1]) / (histograms.shape[1] - 1)
        outside, inside = (histograms @ centres) / np.maximum(histograms.sum(axis=1), 1)
        return cls(lesion=max(float(inside), DEFAULT_THRESHOLD), background=min(float(outside), DEFAULT_THRESHOLD))


@dataclass(frozen=True, kw_only=True, eq=False)
class Measures:
    """All that is measured of one mask (module docstring); Dice in [0, 1]."""

    lesion_area: float
    """Share of the image inside of the mask, 0 to 1."""
    predicted_area: float
    """Share of the image inside of the prediction at 0.5, 0 to 1."""
    dice: float
    """Of mask and prediction."""
    expected_dice: float
    """Of the prediction and a mask drawn by the probabilities: how well the model expects to do."""
    error_ratio: float
    """Dice error of the mask, over the expected one; about 1 is usual."""
    contradiction: float
    """Inscribed radius of the widest region of confident disagreement, over the radius of the lesion."""
    missing_share: float
    """Share of the pixels of confident disagreement that lie outside of the mask: 1 where it lacks lesion only."""
    shifted_dice: float
    """Dice where the mask fits the prediction best."""
    shift: tuple[float, float]
    """Move (down, right) that brings it there, as shares of the image's side."""
    shift_gain: float
    """Dice error of the mask over that where it fits best; 0 where it fits nowhere."""
    inverted_dice: float
    """Dice of the prediction and the mask with black and white exchanged: of lesion or of background, the lower one."""
    hole_share: float
    """Share of the mask, with its holes filled, that is holes."""
    filled_dice: float
    """Dice of the prediction and the mask with its holes filled."""
    islet_share: float
    """Share of the mask outside of its largest connected part."""
    largest_dice: float
    """Dice of the prediction and the largest connected part of the mask."""
    thumbnails: np.ndarray
    """Mask and prediction on a small grid, bool (2, 32, 32)."""


def probability_histograms(mask: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Count probabilities (H, W) uint8, in 255ths, outside of a mask (H, W) bool and inside of it: int64 (2, 256)."""
    return np.stack([np.bincount(levels[mask == inside], minlength=256) for inside in (False, True)])


def dice_of_masks(first: np.ndarray, second: np.ndarray) -> float:
    """Compute the Dice of two masks (H, W) bool; 1 where both are empty."""
    both = int((first & second).sum())
    return dice_of(both, int(second.sum()) - both, int(first.sum()) - both)


def measure(mask: np.ndarray, levels: np.ndarray, confidence: Confidence) -> Measures:
    """Measure a mask (H, W) bool against the probabilities (H, W) uint8, in 255ths, of a square image."""
    probs = levels / np.float32(255)
    prediction = probs > DEFAULT_THRESHOLD
    dice, expected = dice_of_masks(mask, prediction), _expected_dice(probs, prediction)
    lacking, excess = ~mask & (probs >= confidence.lesion), mask & (probs <= confidence.background)
    contradicted = lacking | excess
    shifted_dice, shift = _best_shift(_sample(mask, GRID), _sample(prediction, GRID))
    filled, largest = np.asarray(ndimage.binary_fill_holes(mask)), _largest_part(mask)
    return Measures(
        lesion_area=float(mask.mean()),
        predicted_area=float(prediction.mean()),
        dice=dice,
        expected_dice=expected,
        error_ratio=(1 - dice) / (1 - expected + ERROR_FLOOR),
        contradiction=_inscribed_radius(contradicted) / max(_radius(mask), _radius(prediction), len(mask) / 32),
        missing_share=float(lacking.sum() / max(contradicted.sum(), 1)),
        shifted_dice=shifted_dice,
        shift=shift,
        shift_gain=(1 - dice) / (1 - shifted_dice + SHIFT_ERROR_FLOOR) if shifted_dice >= MIN_SHIFTED_DICE else 0.0,
        inverted_dice=min(dice_of_masks(~mask, prediction), dice_of_masks(mask, ~prediction)),
        hole_share=float((filled & ~mask).sum() / max(filled.sum(), 1)),
        filled_dice=dice_of_masks(filled, prediction),
        islet_share=1 - float(largest.sum() / max(mask.sum(), 1)) if mask.any() else 0.0,
        largest_dice=dice_of_masks(largest, prediction),
        thumbnails=np.stack([_sample(mask, THUMBNAIL), _sample(prediction, THUMBNAIL)]),
    )


def _expected_dice(probs: np.ndarray, prediction: np.ndarray) -> float:
    """Dice of the prediction and the probabilities, as if they were a mask of grey values."""
    total = float(probs.sum()) + float(prediction.sum())
    return 2 * float(probs[prediction].sum()) / total if total else 1.0


def _radius(mask: np.ndarray) -> float:
    """Radius of a disc of the mask's area, in pixels."""
    return math.sqrt(float(mask.sum()) / math.pi)


def _inscribed_radius(region: np.ndarray) -> float:
    """Radius of the largest disc inside of a region (H, W) bool, which goes on beyond the image; 0 for none."""
    distances = np.asarray(ndimage.distance_transform_edt(np.pad(region, 1, mode="edge")))
    return float(distances.max())


def _sample(mask: np.ndarray, side: int) -> np.ndarray:
    """Sample a mask on a grid of `side` × `side`, at most its own."""
    height, width = mask.shape
    rows, columns = (np.arange(side) * length // side for length in (height, width))
    return mask[np.ix_(rows, columns)]


def _best_shift(mask: np.ndarray, prediction: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Find the Dice at the move (down, right) that fits a mask to the prediction best, in shares of the side."""
    side = len(mask)
    total = int(mask.sum()) + int(prediction.sum())
    if not total:
        return 1.0, (0.0, 0.0)
    padded = (2 * side, 2 * side)  # so that nothing that leaves on one side comes back on the other
    spectra = [np.fft.rfft2(each.astype(np.float32), s=padded) for each in (mask, prediction)]
    overlaps = np.fft.irfft2(np.conj(spectra[0]) * spectra[1], s=padded)
    down, right = np.unravel_index(int(overlaps.argmax()), overlaps.shape)
    moves = [int(move) - 2 * side * (int(move) >= side) for move in (down, right)]
    return min(1.0, 2 * float(overlaps.max()) / total), (moves[0] / side, moves[1] / side)


def _largest_part(mask: np.ndarray) -> np.ndarray:
    """Select the largest connected part of a mask, bool (H, W)."""
    labels = np.empty(mask.shape, np.int32)
    ndimage.label(mask, structure=np.ones((3, 3)), output=labels)
    areas = np.bincount(labels.ravel())[1:]
    return labels == 1 + int(areas.argmax()) if len(areas) else mask
