"""Scores at every threshold from one pass (precision-recall curve, calibration): two histograms of the probability.

A pixel of probability p is in bin k where k/256 < p <= (k+1)/256 (0 is in bin 0), so the pixels above the threshold
k/256 are exactly those of bin k and beyond: p times 256 is exact in float32, and so is the bin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from isicdist.metrics.dice import dice_of, jaccard_of, ratio

if TYPE_CHECKING:
    from accelerate import Accelerator

BINS = 256
TOLERANCE = 0.001
"""Pooled Dice by which a threshold must be better than one nearer to 0.5. The curve of a trained network is flat, and
its maximum noise: thresholds of 0.46 and 0.67 that were the best on val cost 0.0002 and 0.0015 of mean Dice on test."""


class ThresholdReduction:
    """Metric that collects the histograms of the images on its rank, then sums them over all ranks once."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """Start with no image; `device` is that of the batches."""
        # Row 0: pixels off the lesion, row 1: on it. Column k + 1 is bin k, column 0 counts NaN.
        self._counts = torch.zeros((2, BINS + 1), dtype=torch.int64, device=device)

    def update(self, probs: Tensor, masks: Tensor, ids: Tensor, valid: Tensor) -> None:
        """Count the pixels of one batch: probs and masks (B, 1, H, W), slots that hold an image (B,) bool.

        `ids` is there for the metrics that count per image: here all pixels are pooled.
        """
        columns = (probs.float() * BINS).ceil_().clamp_(min=1)  # in place: this is most of what counting costs
        columns = columns.nan_to_num_(nan=0).add_(masks > 0.5, alpha=BINS + 1)
        columns.masked_fill_(~valid.view(-1, 1, 1, 1), _UNUSED)  # to select slots would wait for the device
        self._counts += _histogram(columns.flatten(), _UNUSED + 1)[:_UNUSED].view(2, BINS + 1)

    def reduce(self, accelerator: Accelerator) -> ThresholdCurve:
        """Compute the curve over all ranks, the same on each. Every rank must call it, with images or without."""
        counts = torch.as_tensor(accelerator.reduce(self._counts, "sum")).cpu().numpy()
        bins, undefined = counts[:, 1:].copy(), counts[:, 0]
        bins[:, 0] += undefined
        return ThresholdCurve(on=bins[1], off=bins[0], undefined=int(undefined.sum()))


_UNUSED = 2 * (BINS + 1)
"""Column of the pixels in slots without an image."""


def _histogram(columns: Tensor, bins: int) -> Tensor:
    """Count whole numbers from 0 to below `bins`, float (N,), int64 (bins,), without waiting for the device."""
    if columns.device.type == "cpu":
        return torch.bincount(columns.int(), minlength=bins)
    # bincount reads the highest number back. histc counts in the type of its input: float32 would end at 2^24.
    return torch.histc(columns.double().add_(0.5), bins=bins, min=0, max=bins).long()


@dataclass(frozen=True, kw_only=True)
class CurveSummary:
    """The numbers of one curve, each in [0, 1]; see the properties of `ThresholdCurve`."""

    best_threshold: float
    best_pooled_dice: float
    average_precision: float
    calibration_error: float


@dataclass(frozen=True, kw_only=True, eq=False)
class ThresholdCurve:
    """Pooled scores at each threshold k/256, k from 0 to 255, over all pixels of a split."""

    on: np.ndarray
    """Lesion pixels in each bin of probability, int64 (256,)."""
    off: np.ndarray
    """Other pixels in each bin, int64 (256,)."""
    undefined: int = 0
    """Pixels in bin 0 whose probability is not a number: above no threshold, as `DiceReduction` has them."""

    @property
    def counts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """TP, FP and FN at each threshold, int64 (256,) each."""
        tp, fp = (np.cumsum(bins[::-1])[::-1] for bins in (self.on, self.off))
        return tp, fp, self.on.sum() - tp

    @property
    def dice(self) -> np.ndarray:
        """Pooled Dice at each threshold, float64 (256,); 1 where there is neither lesion nor prediction."""
        return dice_of(*self.counts)

    @property
    def jaccard(self) -> np.ndarray:
        """Pooled Jaccard at each threshold, float64 (256,); 1 where there is neither lesion nor prediction."""
        return jaccard_of(*self.counts)

    @property
    def precision(self) -> np.ndarray:
        """Share of lesion in the prediction at each threshold, float64 (256,); 1 where nothing is predicted."""
        tp, fp, _ = self.counts
        return ratio(tp, tp + fp)

    @property
    def recall(self) -> np.ndarray:
        """Share of the lesion that is predicted at each threshold, float64 (256,); 1 where there is no lesion."""
        tp, _, fn = self.counts
        return ratio(tp, tp + fn)

    @property
    def best_threshold(self) -> float:
        """Threshold of the highest pooled Dice, from 1/256 to 255/256; of several, the nearest to 0.5."""
        dice = self.dice[1:]
        highest = 1 + np.flatnonzero(dice == dice.max())
        return int(min(highest, key=lambda k: abs(k - BINS // 2))) / BINS

    @property
    def tuned_threshold(self) -> float:
        """Threshold to predict at: the nearest to 0.5 whose pooled Dice is within `TOLERANCE` of the highest."""
        dice = self.dice[1:]
        good = 1 + np.flatnonzero(dice >= dice.max() - TOLERANCE)
        return int(min(good, key=lambda k: abs(k - BINS // 2))) / BINS

    @property
    def average_precision(self) -> float:
        """Area under the precision-recall curve over pixels, as steps between the thresholds; 1 without any lesion."""
        if not self.on.any():
            return 1.0
        return math.fsum(self.on * self.precision) / int(self.on.sum())

    @property
    def calibration_error(self) -> float:
        """Expected calibration error: mean over pixels of |share of lesion in the bin - its middle|, exact to 1/512."""
        middles = (np.arange(BINS) + 0.5) / BINS
        total = int(self.on.sum() + self.off.sum())
        return math.fsum(np.abs(self.on - middles * (self.on + self.off))) / max(1, total)

    def summary(self) -> CurveSummary:
        """Reduce the curve to the four numbers of summary.json."""
        return CurveSummary(
            best_threshold=self.best_threshold,
            best_pooled_dice=float(self.dice[1:].max()),
            average_precision=self.average_precision,
            calibration_error=self.calibration_error,
        )

    def table(self) -> list[dict[str, Any]]:
        """Return the rows of thresholds.csv, one per threshold: counts, scores, and the pixels of the bin above it."""
        columns = {
            "threshold": np.arange(BINS) / BINS,
            **dict(zip(("tp", "fp", "fn"), self.counts, strict=True)),
            "pooled_dice": self.dice,
            "pooled_jaccard": self.jaccard,
            "precision": self.precision,
            "recall": self.recall,
            "bin_pixels": self.on + self.off,
            "bin_lesion_pixels": self.on,
        }
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in rows]
