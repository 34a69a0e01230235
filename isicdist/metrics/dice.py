"""Exact Dice and Jaccard over all ranks: per-image counts in integers, one exchange, float64 at the very end.

Each rank counts true positives (TP), false positives (FP) and false negatives (FN) of its images in int64.
`DiceReduction.reduce` gathers these rows once, drops duplicates, asserts that no image is missing and only then
divides. Rows are sorted by id and summed with `math.fsum`, so the result does not depend on which rank held which
image: it is the same to the last bit for every world size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

DEFAULT_THRESHOLD = 0.5
"""Threshold of the probability that models are compared at: above it a pixel is lesion."""
JACCARD_THRESHOLD = 0.65
"""ISIC 2018 Task 1: an image whose Jaccard is below it scores 0."""
SCORE_NAMES = ("mean_dice", "pooled_dice", "mean_jaccard", "thresholded_jaccard")


@overload
def ratio(part: int, whole: int) -> float: ...
@overload
def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray: ...
def ratio(part: int | np.ndarray, whole: int | np.ndarray) -> float | np.ndarray:
    """Divide in float64, element by element; 1 where `whole` is 0, for then nothing is wrong. Neither is negative."""
    values = np.divide(part, whole, out=np.ones(np.shape(whole)), where=np.greater(whole, 0))
    return values if isinstance(whole, np.ndarray) else float(values)


@overload
def dice_of(tp: int, fp: int, fn: int) -> float: ...
@overload
def dice_of(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray) -> np.ndarray: ...
def dice_of(tp: Any, fp: Any, fn: Any) -> float | np.ndarray:
    """Dice of counts of pixels, 2TP / (2TP + FP + FN), in [0, 1]: 1 where mask and prediction are both empty."""
    return ratio(2 * tp, 2 * tp + fp + fn)


@overload
def jaccard_of(tp: int, fp: int, fn: int) -> float: ...
@overload
def jaccard_of(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray) -> np.ndarray: ...
def jaccard_of(tp: Any, fp: Any, fn: Any) -> float | np.ndarray:
    """Jaccard of counts of pixels, TP / (TP + FP + FN), in [0, 1]: 1 where mask and prediction are both empty."""
    return ratio(tp, tp + fp + fn)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores of one set of images. An image whose mask and prediction are both empty scores 1."""

    n: int
    """Number of images."""
    mean_dice: float
    """Mean over images of 2TP / (2TP + FP + FN)."""
    pooled_dice: float
    """2 sum(TP) / (2 sum(TP) + sum(FP) + sum(FN)): large lesions weigh more."""
    mean_jaccard: float
    """Mean over images of TP / (TP + FP + FN)."""
    thresholded_jaccard: float
    """Mean over images of Jaccard, 0 where it is below 0.65: the official score of ISIC 2018 Task 1."""


@dataclass(frozen=True, kw_only=True)
class DiceSummary(Scores):
    """Scores together with the counts of each image that they are computed from."""

    rows: np.ndarray = field(repr=False, compare=False)
    """One row per image, sorted by id: id, TP, FP, FN; int64 (n, 4)."""

    @classmethod
    def of(cls, rows: np.ndarray) -> DiceSummary:
        """Compute the scores of rows (n, 4) int64 of (id, TP, FP, FN), each id once. ValueError for no row."""
        if len(rows) == 0:
            raise ValueError("no image was counted: a score needs at least one")
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        dice, jaccard = per_image_scores(rows)
        tp, fp, fn = (int(column.sum()) for column in rows[:, 1:].T)
        n = len(rows)
        return cls(
            n=n,
            mean_dice=math.fsum(dice) / n,
            pooled_dice=dice_of(tp, fp, fn),
            mean_jaccard=math.fsum(jaccard) / n,
            thresholded_jaccard=math.fsum(j for j in jaccard if j >= JACCARD_THRESHOLD) / n,
            rows=rows,
        )

    def scores(self) -> dict[str, Any]:
        """Return n and the four scores by name, without the rows."""
        return {name: getattr(self, name) for name in ("n", *SCORE_NAMES)}


def per_image_scores(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(Dice, Jaccard) of each row (id, TP, FP, FN), float64 (n,); 1 where mask and prediction are both empty."""
    tp, fp, fn = rows[:, 1:].T
    return dice_of(tp, fp, fn), jaccard_of(tp, fp, fn)


def count(predictions: Tensor, masks: Tensor) -> Tensor:
    """Count TP, FP and FN of each image, int64 (B, 3), in two boolean tensors (B, 1, H, W)."""
    p, t = predictions.flatten(1), masks.flatten(1)
    # An image's pixels fit in int32, and on a CPU it sums booleans several times faster.
    tp, positive, lesion = (pixels.sum(1, dtype=torch.int32) for pixels in (p & t, p, t))
    return torch.stack([tp, positive - tp, lesion - tp], dim=1).long()


class DiceReduction:
    """Metric that collects the counts of every image on its rank, then reduces them over all ranks once."""

    def __init__(self, expected: int | None = None, threshold: float = DEFAULT_THRESHOLD) -> None:
        """Start with no image.

        `expected`: number of images of the split, asserted by `reduce` (None: not asserted). `threshold`: of the
        probability, between 0 and 1; else ValueError.
        """
        if not 0 < threshold < 1:
            raise ValueError(f"threshold {threshold}: it must lie between 0 and 1")
        self.expected, self.threshold = expected, threshold
        self._rows: list[Tensor] = []
        self._out_of_range: Tensor | None = None  # bool (): some value so far is no probability

    def update(self, probs: Tensor, masks: Tensor, ids: Tensor, valid: Tensor | None = None) -> None:
        """Count one batch, without an exchange between ranks and without waiting for the device.

        `probs` (B, 1, H, W) in [0, 1], NaN is below every threshold; `masks` (B, 1, H, W), foreground is 1 (any
        value above 0.5). `ids` (B,) int64 name the images; `valid` (B,) bool: the slots that hold an image
        (None: all).
        """
        counts = count(probs > self.threshold, masks > 0.5)
        rows = torch.cat([ids.to(counts.device, torch.int64)[:, None], counts], dim=1)  # (B, 4)
        if valid is not None:
            # An invalid slot stays, as a row of id -1: to select rows would wait for the device.
            rows = torch.where(valid.to(rows.device)[:, None], rows, -1)
        self.add(rows)
        self._note_range(probs)

    def add(self, rows: Tensor) -> None:
        """Add rows (N, 4) int64 of (id, TP, FP, FN) that were counted elsewhere."""
        self._rows.append(rows)

    def reduce(self, accelerator: Accelerator) -> DiceSummary:
        """Compute the summary over all ranks, the same on each. Every rank must call it, with images or without.

        Raises RuntimeError when the images counted are not the `expected` ones, or one was counted twice with
        different results; ValueError when a value that `update` got, on any rank, is no probability.
        """
        device = accelerator.device
        rows = torch.cat(self._rows) if self._rows else torch.empty((0, 4), dtype=torch.int64)
        rows = rows.to(device)
        lengths, out_of_range = self._exchange_lengths(len(rows), accelerator)
        if out_of_range:
            raise ValueError("probs outside of [0, 1]: these look like logits; apply sigmoid before update")
        padded = torch.full((max(1, *lengths), 4), -1, dtype=torch.int64, device=device)
        padded[: len(rows)] = rows
        gathered = accelerator.gather(padded)
        table = torch.as_tensor(gathered).cpu().numpy()
        table = np.unique(table[table[:, 0] != -1], axis=0)
        ids, times = np.unique(table[:, 0], return_counts=True)
        if (times > 1).any():
            raise RuntimeError(f"image {ids[times > 1][0]} was counted twice with different results")
        if self.expected is not None and len(ids) != self.expected:
            raise RuntimeError(f"{len(ids)} images were counted, but the split has {self.expected}")
        return DiceSummary.of(table)

    def _note_range(self, probs: Tensor) -> None:
        """Remember on the device whether a value lies outside of [0, 1]. A comparison with NaN is false: no error."""
        if probs.numel():
            low, high = torch.aminmax(probs)
            outside = (low < 0) | (high > 1)
            self._out_of_range = outside if self._out_of_range is None else self._out_of_range | outside

    def _exchange_lengths(self, length: int, accelerator: Accelerator) -> tuple[list[int], bool]:
        """Return the number of rows of every rank, and whether any rank got a value that is no probability.

        Each rank fills its own column, and the columns are summed: one small all-reduce.
        """
        columns = torch.zeros((2, accelerator.num_processes), dtype=torch.int64, device=accelerator.device)
        columns[0, accelerator.process_index] = length
        if self._out_of_range is not None:
            columns[1, accelerator.process_index] = self._out_of_range
        summed: list[list[int]] = torch.as_tensor(accelerator.reduce(columns, "sum")).tolist()
        lengths, flags = summed
        return lengths, any(flags)


def pooled_dice(counts: Tensor, accelerator: Accelerator) -> float:
    """Pooled Dice of the counts (3,) int64 of TP, FP, FN that each rank has summed: one small all-reduce."""
    summed: list[int] = torch.as_tensor(accelerator.reduce(counts, "sum")).tolist()
    tp, fp, fn = summed
    return dice_of(tp, fp, fn)
