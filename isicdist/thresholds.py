"""Every threshold from one pass: two histograms of the probability, on the lesion and off it.

A pixel of probability p is in bin k where k/256 < p <= (k+1)/256, so the pixels above the threshold k/256 are
exactly those of bin k and beyond. The bins are cut in logits, by the rule `DiceReduction` counts with: at a
threshold both see the same pixels as lesion.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

BINS = 256


class ThresholdReduction:
    """Collects the histograms of the images on its rank, then sums them over all ranks once."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        cuts = [math.log(k / (BINS - k)) for k in range(1, BINS)]  # logit(k/256)
        self._cuts = torch.tensor(cuts, dtype=torch.float32, device=device)
        self._counts = torch.zeros((2, BINS), dtype=torch.int64, device=device)  # off the lesion, on it

    def update(self, logits: Tensor, masks: Tensor, ids: Tensor, valid: Tensor) -> None:
        """Count the pixels of one batch: logits and masks (B, 1, H, W), places that hold an image (B,) bool.

        `ids` is not used: pixels are pooled.
        """
        logits, masks = logits[valid], masks[valid]
        bins = torch.bucketize(logits.detach().float(), self._cuts, out_int32=True)  # cuts[bin - 1] < logit
        bins += (masks > 0.5).int() * BINS
        self._counts += torch.bincount(bins.flatten(), minlength=2 * BINS).view(2, BINS)

    def reduce(self, accelerator: Accelerator) -> ThresholdCurve:
        """The curve over all ranks, the same on each. Every rank must call it, images or not."""
        counts = torch.as_tensor(accelerator.reduce(self._counts, "sum"))
        off, on = counts.cpu().numpy()
        return ThresholdCurve(on=on, off=off)


@dataclass(frozen=True, kw_only=True, eq=False)
class ThresholdCurve:
    """Pooled scores at each threshold k/256, k from 0 to 255, over all pixels of a split."""

    on: np.ndarray
    """Lesion pixels in each bin of probability, int64 (256,)."""
    off: np.ndarray
    """Other pixels in each bin, int64 (256,)."""

    @property
    def counts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """TP, FP, FN at each threshold, int64 (256,) each."""
        tp, fp = (np.cumsum(bins[::-1])[::-1] for bins in (self.on, self.off))
        return tp, fp, self.on.sum() - tp

    @property
    def dice(self) -> np.ndarray:
        """Pooled Dice at each threshold, float64 (256,); 1 where there is neither lesion nor prediction."""
        tp, fp, fn = self.counts
        return _share(2 * tp, 2 * tp + fp + fn)

    @property
    def jaccard(self) -> np.ndarray:
        """Pooled Jaccard at each threshold, float64 (256,); 1 where there is neither lesion nor prediction."""
        tp, fp, fn = self.counts
        return _share(tp, tp + fp + fn)

    @property
    def precision(self) -> np.ndarray:
        """Share of lesion in the prediction at each threshold, float64 (256,); 1 where nothing is predicted."""
        tp, fp, _ = self.counts
        return _share(tp, tp + fp)

    @property
    def recall(self) -> np.ndarray:
        """Share of the lesion that is predicted at each threshold, float64 (256,); 1 where there is no lesion."""
        tp, _, fn = self.counts
        return _share(tp, tp + fn)

    @property
    def best_threshold(self) -> float:
        """The lowest threshold of the highest pooled Dice, from 1/256 to 255/256."""
        return (1 + int(self.dice[1:].argmax())) / BINS

    @property
    def average_precision(self) -> float:
        """Area under precision over recall, as steps between the thresholds, over pixels; 1 without any lesion."""
        if not self.on.any():
            return 1.0
        return math.fsum(self.on * self.precision) / int(self.on.sum())

    @property
    def calibration_error(self) -> float:
        """Mean over pixels of |share of lesion in the bin - the bin's middle|: exact to 1/512."""
        middles = (np.arange(BINS) + 0.5) / BINS
        total = int(self.on.sum() + self.off.sum())
        return math.fsum(np.abs(self.on - middles * (self.on + self.off))) / max(1, total)

    def summary(self) -> dict[str, float]:
        """What the curve comes to, by name."""
        return {
            "best_threshold": self.best_threshold,
            "best_pooled_dice": float(self.dice[1:].max()),
            "average_precision": self.average_precision,
            "calibration_error": self.calibration_error,
        }

    def table(self) -> list[dict[str, Any]]:
        """One row per threshold: counts, scores, and the pixels and lesion share of the bin above it."""
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


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.where(whole > 0, part / np.where(whole > 0, whole, 1), 1.0)
