"""Running averages between two lines of the log, kept on the device so that no step waits for them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from isicdist.data.stream import Batch
from isicdist.metrics.dice import count, pooled_dice

if TYPE_CHECKING:
    from accelerate import Accelerator


class TrainMeter:
    """What is measured between two lines of the log; on the device, without waiting for it."""

    def __init__(self, accelerator: Accelerator) -> None:
        """It begins now."""
        self._accelerator = accelerator
        self._reset()

    def waiting(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """`batches`, with the time spent waiting for each."""
        source = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(source, None)
            self._waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def add(self, logits: Tensor, masks: Tensor, valid: Tensor) -> None:
        """One micro batch of this rank: logits and masks (B, 1, H, W), valid (B,)."""
        counts = count(logits.detach() > 0, masks > 0) * valid[:, None]
        self._counts += counts.sum(0)

    def add_step(self, loss: Tensor, bad: Tensor, samples: int) -> None:
        """One step of all ranks: its loss and whether its update was left out, scalars on the device."""
        self._loss += torch.where(bad, 0, loss)
        self._skipped += bad
        self._steps += 1
        self._images += samples

    def report(self) -> dict[str, Any]:
        """The measures over all ranks since the last report; the counts are summed in one exchange.

        The loss is the mean over the steps that counted: NaN where there is none.
        """
        seconds, skipped = time.perf_counter() - self._since, int(self._skipped)
        taken = self._steps - skipped
        measured = {
            "loss": float(self._loss) / taken if taken else float("nan"),
            "pooled_dice": pooled_dice(self._counts, self._accelerator),
            "images_per_s": self._images / seconds,
            "data_wait": self._waited / seconds,
            "skipped": skipped,
        }
        self._reset()
        return measured

    def _reset(self) -> None:
        device = self._accelerator.device
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)
        self._loss = torch.zeros((), dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._steps, self._images, self._waited, self._since = 0, 0, 0.0, time.perf_counter()
