"""Scores at each image's original resolution, as the ISIC 2018 challenge takes them: counted on threads.

While the network works on the next batch, threads bring the probabilities of the last ones back to the size of
the photograph (undoing the fit), cut them at the threshold and compare them with the original mask.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor

from isicdist.dice import DiceReduction, DiceSummary
from shards import format
from shards.geometry import Fit
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

    def __init__(self, split: Split, *, threshold: float = 0.5, workers: int = 2) -> None:
        """`split` must carry original masks (`has_originals`). `threshold`: of the probability."""
        self.split, self.threshold = split, threshold
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="restore")
        self._counting: deque[Future[Row]] = deque()
        self._rows: list[Row] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def update(self, logits: Tensor, masks: Tensor, ids: Tensor, valid: Tensor) -> None:
        """Hand one batch to the threads: logits (B, 1, H, W), sample numbers (B,), places that hold one (B,).

        `masks` is not used: the original ones are read from the split.
        """
        probs = logits.detach().float().sigmoid()[:, 0].cpu().numpy()  # (B, H, W)
        for number, prob, is_image in zip(ids.tolist(), probs, valid.tolist(), strict=True):
            if is_image:
                self._counting.append(self._pool.submit(self._count, number, prob))
        self._collect(WAITING)

    def reduce(self, accelerator: Accelerator) -> DiceSummary:
        """The summary over all ranks, as `DiceReduction.reduce` gives it. Every rank must call it."""
        self._collect(0)
        reduction = DiceReduction(expected=len(self.split), threshold=self.threshold)
        reduction.add(torch.tensor(self._rows, dtype=torch.int64).reshape(-1, 4))
        return reduction.reduce(accelerator)

    def _collect(self, waiting: int) -> None:
        while len(self._counting) > waiting:
            self._rows.append(self._counting.popleft().result())

    def _count(self, number: int, prob: np.ndarray) -> Row:
        restored = Fit.from_json(self.split.meta(number)["fit"]).restore(prob)
        truth = self.split.original_mask(number)
        assert truth is not None, "the split carries no original masks"
        prediction, lesion = restored > self.threshold, truth.astype(bool)  # (H, W)
        tp = int(np.count_nonzero(prediction & lesion))
        return number, tp, int(np.count_nonzero(prediction)) - tp, int(np.count_nonzero(lesion)) - tp
