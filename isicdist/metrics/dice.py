"""Dice over all devices, exactly: per-image counts in integers, one exchange, float64 at the very end.

Each rank counts true positives (TP), false positives (FP) and false negatives (FN) of its images in int64.
`DiceReduction.reduce` gathers these rows once, drops what was counted twice, asserts that none is missing and
only then divides. Rows are sorted by id and summed with `math.fsum`, so the result does not depend on who held
which image: it is the same to the last bit for every world size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

DEFAULT_THRESHOLD = 0.5
"""The threshold of the probability that scores are compared at: above it a pixel is lesion."""
JACCARD_THRESHOLD = 0.65
"""ISIC 2018 Task 1: an image whose Jaccard is below it scores 0."""


@dataclass(frozen=True, kw_only=True)
class DiceSummary:
    """The scores of one set of images. An image whose mask and prediction are both empty scores 1."""

    n: int
    """Images."""
    mean_dice: float
    """Mean over images of 2TP / (2TP + FP + FN)."""
    pooled_dice: float
    """2 sum(TP) / (2 sum(TP) + sum(FP) + sum(FN)): large lesions weigh more."""
    mean_jaccard: float
    """Mean over images of TP / (TP + FP + FN)."""
    thresholded_jaccard: float
    """Mean over images of Jaccard, 0 where it is below 0.65: the official score of ISIC 2018 Task 1."""
    rows: np.ndarray = field(repr=False, compare=False)
    """One row per image, sorted by id: id, TP, FP, FN; int64 (n, 4)."""

    @classmethod
    def of(cls, rows: np.ndarray) -> DiceSummary:
        """The scores of rows (n, 4) int64 of (id, TP, FP, FN), n at least 1, each id once."""
        if len(rows) == 0:
            raise ValueError("no image was counted: a score needs at least one")
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        dice, jaccard = per_image_scores(rows)
        tp, fp, fn = (int(column.sum()) for column in rows[:, 1:].T)
        n = len(rows)
        return cls(
            n=n,
            mean_dice=math.fsum(dice) / n,
            pooled_dice=2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 1.0,
            mean_jaccard=math.fsum(jaccard) / n,
            thresholded_jaccard=math.fsum(j for j in jaccard if j >= JACCARD_THRESHOLD) / n,
            rows=rows,
        )

    def scores(self) -> dict[str, Any]:
        """n and the four scores by name."""
        names = ("n", "mean_dice", "pooled_dice", "mean_jaccard", "thresholded_jaccard")
        return {name: getattr(self, name) for name in names}


def per_image_scores(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(Dice, Jaccard) of each row (id, TP, FP, FN), float64 (n,); 1 where mask and prediction are both empty."""
    tp, fp, fn = rows[:, 1:].T.astype(np.float64)
    empty = tp + fp + fn == 0
    denominator = np.where(empty, 1.0, tp + fp + fn)
    dice = np.where(empty, 1.0, 2 * tp / (tp + denominator))
    return dice, np.where(empty, 1.0, tp / denominator)


def count(predictions: Tensor, masks: Tensor) -> Tensor:
    """TP, FP, FN of each image, int64 (B, 3), of two boolean tensors (B, 1, H, W)."""
    p, t = predictions.flatten(1), masks.flatten(1)
    # An image's pixels fit in int32, and on a CPU it sums booleans several times faster.
    tp, positive, lesion = (pixels.sum(1, dtype=torch.int32) for pixels in (p & t, p, t))
    return torch.stack([tp, positive - tp, lesion - tp], dim=1).long()


class DiceReduction:
    """Collects the counts of every image on its rank, then reduces them over all ranks once."""

    def __init__(self, expected: int | None = None, threshold: float = DEFAULT_THRESHOLD) -> None:
        """`expected`: the images of the split, asserted at the end (None: not). `threshold`: of the probability."""
        if not 0 < threshold < 1:
            raise ValueError(f"threshold {threshold}: it must lie between 0 and 1")
        self.expected, self.threshold = expected, threshold
        self._rows: list[Tensor] = []

    def update(self, probs: Tensor, masks: Tensor, ids: Tensor, valid: Tensor | None = None) -> None:
        """Count one batch; nothing is exchanged and the device is not waited for.

        `probs` and `masks` (B, 1, H, W); a mask's foreground is 1 (any value above 0.5). `ids` (B,) int64 name
        the images; `valid` (B,) bool: the places that hold an image (None: all).
        """
        counts = count(probs > self.threshold, masks > 0.5)
        rows = torch.cat([ids.to(counts.device, torch.int64)[:, None], counts], dim=1)  # (B, 4)
        if valid is not None:
            # A masked place is kept as a row of id -1: choosing rows would wait for the device.
            rows = torch.where(valid.to(rows.device)[:, None], rows, -1)
        self.add(rows)

    def add(self, rows: Tensor) -> None:
        """Take rows (N, 4) int64 of (id, TP, FP, FN) that were counted elsewhere."""
        self._rows.append(rows)

    def reduce(self, accelerator: Accelerator) -> DiceSummary:
        """The summary over all ranks, the same on each. Every rank must call it, images or not.

        Raises RuntimeError when the images counted are not the `expected` ones, or one was counted twice with
        different results.
        """
        device = accelerator.device
        rows = torch.cat(self._rows) if self._rows else torch.empty((0, 4), dtype=torch.int64)
        rows = rows.to(device)
        most = int(torch.as_tensor(accelerator.reduce(_one_hot(len(rows), accelerator), "sum")).max())
        places = torch.full((max(1, most), 4), -1, dtype=torch.int64, device=device)
        places[: len(rows)] = rows
        gathered = accelerator.gather(places)
        table = torch.as_tensor(gathered).cpu().numpy()
        table = np.unique(table[table[:, 0] != -1], axis=0)
        ids, times = np.unique(table[:, 0], return_counts=True)
        if (times > 1).any():
            raise RuntimeError(f"image {ids[times > 1][0]} was counted twice with different results")
        if self.expected is not None and len(ids) != self.expected:
            raise RuntimeError(f"{len(ids)} images were counted, but the split has {self.expected}")
        return DiceSummary.of(table)


def _one_hot(value: int, accelerator: Accelerator) -> Tensor:
    """`value` in this rank's place and 0 elsewhere, int64 (world,): summed over ranks it shows every rank's."""
    places = torch.zeros(accelerator.num_processes, dtype=torch.int64, device=accelerator.device)
    places[accelerator.process_index] = value
    return places


def pooled_dice(counts: Tensor, accelerator: Accelerator) -> float:
    """Pooled Dice of the counts (3,) int64 of TP, FP, FN that each rank has summed: one small all-reduce."""
    tp, fp, fn = torch.as_tensor(accelerator.reduce(counts, "sum")).tolist()
    return 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 1.0
