"""Scores at each image's original resolution, as the ISIC 2018 challenge computes them: counted on threads.

While the network works on the next batch, threads resize the probabilities of the batches before it to the size of
the photograph, cut them at the thresholds and compare them with the original mask.
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
from shards.reader import Split

if TYPE_CHECKING:
    from accelerate import Accelerator

MAX_PENDING = 64
"""Images whose count may be pending; then `update` waits for a thread, which bounds the memory."""

Row = tuple[int, int, int, int]
"""id, TP, FP, FN of one image."""


def has_originals(split: Split) -> bool:
    """Return True if every sample of the split carries its mask at the original resolution."""
    return bool((split.table["size"][:, format.ORIGINAL] > 0).all())


class OriginalReduction:
    """Metric like `DiceReduction`, at the original resolution. Use it as a context manager: it owns threads."""

    def __init__(self, split: Split, *, thresholds: Sequence[float], workers: int = 2) -> None:
        """Start with no image.

        `split` must carry original masks (`has_originals`). `thresholds`: of the probability; each is counted.
        `workers`: threads.
        """
        self.split, self.thresholds = split, thresholds
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="restore")
        self._pending: deque[Future[list[Row]]] = deque()
        self._rows: list[list[Row]] = []  # per image, a row for each threshold

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def update(self, probs: Tensor, masks: Tensor, ids: Tensor, valid: Tensor) -> None:
        """Hand one batch to the threads: probs (B, 1, H, W), indices of samples (B,), slots that hold one (B,) bool.

        `masks` are there for the metrics at the network's resolution: here the original masks are read from the split.
        """
        for index, prob, is_image in zip(ids.tolist(), probs[:, 0].cpu().numpy(), valid.tolist(), strict=True):
            if is_image:
                self._pending.append(self._pool.submit(self._count, index, prob))
        self._collect_until(MAX_PENDING)

    def reduce(self, accelerator: Accelerator) -> list[DiceSummary]:
        """Compute the summary of each threshold over all ranks, as `DiceReduction.reduce`; every rank must call it.

        Raises CorruptShardError when an original mask does not decode.
        """
        self._collect_until(0)
        return [self._reduce_one(column, accelerator) for column in range(len(self.thresholds))]

    def _reduce_one(self, column: int, accelerator: Accelerator) -> DiceSummary:
        reduction = DiceReduction(expected=len(self.split), threshold=self.thresholds[column])
        rows = [rows[column] for rows in self._rows]
        reduction.add(torch.tensor(rows, dtype=torch.int64).reshape(-1, 4))
        return reduction.reduce(accelerator)

    def _collect_until(self, pending: int) -> None:
        """Wait for threads until at most `pending` images are pending."""
        while len(self._pending) > pending:
            self._rows.append(self._pending.popleft().result())

    def _count(self, index: int, prob: np.ndarray) -> list[Row]:
        """Count one image at every threshold: `prob` (H, W) float32 at the network's resolution."""
        restored = self.split.resize_plan(index).restore(prob)
        truth = self.split.original_mask(index)
        assert truth is not None, "the split carries no original masks"
        lesion = truth.astype(bool)  # (H, W)
        area, rows = int(np.count_nonzero(lesion)), list[Row]()
        for threshold in self.thresholds:
            prediction = restored > threshold
            tp = int(np.count_nonzero(prediction & lesion))
            rows.append((index, tp, int(np.count_nonzero(prediction)) - tp, area - tp))
        return rows
