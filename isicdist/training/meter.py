"""Running averages between two lines of the log, kept on the device so that no step waits for them."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from isicdist.data.stream import Batch
from isicdist.metrics.dice import count, pooled_dice

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Averages over the steps since the last line of the log, over all ranks; evaluations take no part in them."""

    loss: float
    """Mean over the steps whose update was made; NaN where there is none."""
    pooled_dice: float
    """Of the training predictions at probability 0.5, 0 to 1."""
    images_per_s: float
    """Images per second on all ranks together."""
    data_wait: float
    """Share of the time spent waiting for a batch on this rank, 0 to 1."""
    skipped: int
    """Steps whose update was skipped, as loss or gradient was not finite."""
    memory_bytes: int
    """Peak memory so far: reserved on this rank's GPU, or resident of its process on a CPU."""


class TrainMeter:
    """Accumulates loss, Dice counts, skipped steps and throughput; `compute` gives and resets them."""

    def __init__(self, accelerator: Accelerator) -> None:
        """Start measuring now."""
        self._accelerator = accelerator
        self.reset()

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches, and measure the time spent waiting for each."""
        source = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(source, None)
            self._waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def add_micro_batch(self, logits: Tensor, masks: Tensor, valid: Tensor) -> None:
        """Count one micro batch of this rank: logits and masks (B, 1, H, W), valid (B,)."""
        counts = count(logits.detach() > 0, masks > 0) * valid[:, None]  # (B, 3)
        self._counts += counts.sum(0)

    def add_step(self, loss: Tensor, skipped: Tensor, samples: int) -> None:
        """Add one step of all ranks: its loss, and a bool for a skipped update, scalars on the device."""
        self._loss += torch.where(skipped, 0, loss)
        self._skipped += skipped
        self._steps += 1
        self._images += samples

    @contextlib.contextmanager
    def paused(self) -> Generator[None]:
        """Leave the time of a block, such as an evaluation, out of the throughput. Waits for the device first."""
        self._skipped.item()  # the steps that are queued belong to the interval
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def compute(self) -> Measured:
        """Give the averages over all ranks since the last call, and reset; every rank calls it (one all-reduce)."""
        skipped, loss = int(self._skipped), float(self._loss)  # waits for the device ...
        dice = pooled_dice(self._counts, self._accelerator)
        seconds = time.perf_counter() - self._since  # ... so that its backlog belongs to this interval
        updates = self._steps - skipped
        measured = Measured(
            loss=loss / updates if updates else float("nan"),
            pooled_dice=dice,
            images_per_s=self._images / seconds,
            data_wait=self._waited / seconds,
            skipped=skipped,
            memory_bytes=peak_memory(self._accelerator.device),
        )
        self.reset()
        return measured

    def reset(self) -> None:
        """Start measuring anew."""
        device = self._accelerator.device
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)
        self._loss = torch.zeros((), dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._steps, self._images, self._waited, self._since = 0, 0, 0.0, time.perf_counter()


def peak_memory(device: torch.device) -> int:
    """Give the peak memory of this process in bytes: reserved on its GPU, or resident where it computes on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of `ru_maxrss`
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
