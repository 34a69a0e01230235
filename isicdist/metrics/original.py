"""Scores at each image's original resolution, as the ISIC 2018 challenge takes them: counted on threads.

While the network works on the next batch, threads bring the probabilities of the last ones back to the size of
the photograph (undoing the fit), cut them at the thresholds and compare them with the original mask.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor

from isicdist.metrics.dice import DiceReduction, DiceSummary
from shards import format
from shards.geometry import ResizePlan
from shards.reader import Split

if TYPE_CHECKING:
    from accelerate import Accelerator

WAITING = 64
"""Images that may wait for a thread: more would only fill the memory."""

Row = tuple[int, int, int, int]
"""id, TP, FP, FN of one image."""


def has_originals(split: Split) -> bool:
    """Whether every sample of the split carries its mask at the original resolution."""
    return bool((split.table["size"][:, format.ORIGINAL] > 0).all())


class OriginalReduction:
    """What `DiceReduction` is, at the original resolution. Use it as a context manager: it owns threads."""

    def __init__(self, split: Split, *, thresholds: Sequence[float], workers: int = 2) -> None:
        """`split` must carry original masks (`has_originals`). `thresholds`: of the probability; each is counted."""
        self.split, self.thresholds = split, thresholds
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="restore")
        self._counting: deque[Future[list[Row]]] = deque()
        self._rows: list[list[Row]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def update(self, probs: Tensor, masks: Tensor, ids: Tensor, valid: Tensor) -> None:
        """Hand one batch to the threads: probs (B, 1, H, W), sample numbers (B,), places that hold one (B,).

        `masks` is not used: the original ones are read from the split.
        """
        for number, prob, is_image in zip(ids.tolist(), probs[:, 0].cpu().numpy(), valid.tolist(), strict=True):
            if is_image:
                self._counting.append(self._pool.submit(self._count, number, prob))
        self._collect(WAITING)

    def reduce(self, accelerator: Accelerator) -> list[DiceSummary]:
        """The summary of each threshold over all ranks, as `DiceReduction.reduce` gives it; every rank must call."""
        self._collect(0)
        summaries = []
        for place, threshold in enumerate(self.thresholds):
            reduction = DiceReduction(expected=len(self.split), threshold=threshold)
            rows = [rows[place] for rows in self._rows]
            reduction.add(torch.tensor(rows, dtype=torch.int64).reshape(-1, 4))
            summaries.append(reduction.reduce(accelerator))
        return summaries

    def _collect(self, waiting: int) -> None:
        while len(self._counting) > waiting:
            self._rows.append(self._counting.popleft().result())

    def _count(self, number: int, prob: np.ndarray) -> list[Row]:
        restored = ResizePlan.from_json(self.split.meta(number)["fit"]).restore(prob)
        truth = self.split.original_mask(number)
        assert truth is not None, "the split carries no original masks"
        lesion = truth.astype(bool)  # (H, W)
        area, rows = int(np.count_nonzero(lesion)), []
        for threshold in self.thresholds:
            prediction = restored > threshold
            tp = int(np.count_nonzero(prediction & lesion))
            rows.append((number, tp, int(np.count_nonzero(prediction)) - tp, area - tp))
        return rows
