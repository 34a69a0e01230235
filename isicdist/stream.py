"""Order + reader + parallel decoding -> batches on the device.

Samples are decoded by threads (the codecs release the GIL) straight into slots of preallocated memory, pinned
where there is CUDA, `prefetch` micro batches ahead. The order is planned (`isicdist.order`), so nothing is
negotiated between ranks or workers, and the state of a stream is a few integers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from isicdist.order import MASKED, BatchPlan, epoch_order, num_steps, rank_slice
from shards.errors import CheckpointError, UsageError
from shards.reader import Split


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro batch of one rank. On a CPU the tensors are valid until the next batch is asked for."""

    images: Tensor
    """uint8 (B, 3, H, W) on the device; zeros in masked places."""
    masks: Tensor
    """uint8 (B, 1, H, W) on the device, 1 where the lesion is."""
    numbers: np.ndarray
    """Sample numbers, int64 (B,) on the host; -1 in masked places."""
    last: bool
    """Whether this is the rank's last micro batch of the step."""
    step_samples: int
    """Samples of the whole step over all ranks: what the loss is a mean over."""

    @property
    def valid(self) -> np.ndarray:
        """Which places hold a sample, bool (B,) on the host."""
        return self.numbers != MASKED


class _Slot:
    """Memory for one micro batch on the host, used again and again."""

    def __init__(self, size: int, side: int, device: torch.device) -> None:
        pin = device.type == "cuda"
        self.images = torch.zeros((size, side, side, 3), dtype=torch.uint8, pin_memory=pin)
        self.masks = torch.zeros((size, side, side), dtype=torch.uint8, pin_memory=pin)
        self.image_view, self.mask_view = self.images.numpy(), self.masks.numpy()
        self.copied = torch.cuda.Event() if pin else None

    def fill(self, place: int, split: Split, number: int) -> None:
        if number == MASKED:
            self.image_view[place] = 0
            self.mask_view[place] = 0
        else:
            self.image_view[place] = split.image(number)
            self.mask_view[place] = split.mask(number)

    def to(self, device: torch.device) -> tuple[Tensor, Tensor]:
        images = self.images.to(device, non_blocking=True).permute(0, 3, 1, 2)  # (B, 3, H, W)
        masks = self.masks.to(device, non_blocking=True)[:, None]  # (B, 1, H, W)
        if self.copied:
            self.copied.record()
        return images, masks

    def wait(self) -> None:
        """Until the device has its copy: only then may the slot be filled again."""
        if self.copied:
            self.copied.synchronize()


class Stream:
    """The samples of one split on one rank, as batches. Use it as a context manager: it owns threads."""

    def __init__(
        self,
        split: Split,
        plan: BatchPlan,
        rank: int,
        *,
        seed: int = 0,
        window: int | None = None,
        workers: int = 2,
        prefetch: int = 4,
        device: torch.device | str = "cpu",
    ) -> None:
        """`window`: shards shuffled together (None: all). `workers`: decoding threads. `prefetch`: batches ahead."""
        if split.size is None:
            raise UsageError(f"{split.root}: its images differ in size; build a set for training with --size N")
        self.split, self.plan, self.rank = split, plan, rank
        self.seed, self.window, self.prefetch = seed, window, prefetch
        self.device = torch.device(device)
        self.epoch_number = 0
        self.consumed = 0
        """Samples of the epoch that all ranks together have been given."""
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one epoch, the short last one included."""
        return num_steps(len(self.split), self.plan.global_size)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: a few integers, whatever the size of the set."""
        return {
            "digest": self.split.digest,
            "seed": self.seed,
            "epoch": self.epoch_number,
            "consumed": self.consumed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` stood. Raises CheckpointError when it is of another set, seed or global batch."""
        for name, own in (("digest", self.split.digest), ("seed", self.seed)):
            if state[name] != own:
                raise CheckpointError(
                    f"the checkpoint was trained with {name} {state[name]}, this run has {own}; "
                    "train in a new run folder, or go back to the old value"
                )
        if state["consumed"] % self.plan.global_size:
            raise CheckpointError(
                f"{state['consumed']} samples of the epoch are no whole number of steps of "
                f"{self.plan.global_size} samples; go on with the checkpoint's batch.global_size"
            )
        self.epoch_number, self.consumed = state["epoch"], state["consumed"]

    def epoch(self) -> Iterator[Batch]:
        """The batches that are left of the current epoch, in its order; then the next epoch is the current one."""
        order = epoch_order(self.split, self.seed, self.epoch_number, self.window)
        for batch in self._batches(order, self.consumed // self.plan.global_size):
            if batch.last:  # before the yield: a state saved after this step has it behind it
                self._advance(batch.step_samples)
            yield batch

    def in_order(self) -> Iterator[Batch]:
        """Every sample of the split once over all ranks, in the order of the table: for evaluation."""
        return self._batches(np.arange(len(self.split)), 0)

    def _advance(self, samples: int) -> None:
        self.consumed += samples
        if self.consumed == len(self.split):
            self.epoch_number, self.consumed = self.epoch_number + 1, 0

    def _batches(self, order: np.ndarray, first: int) -> Iterator[Batch]:
        assert self.split.size is not None
        todo = (
            (step, micro, numbers)
            for step in range(first, self.steps_per_epoch)
            for micro, numbers in enumerate(rank_slice(order, step, self.plan, self.rank), start=1)
        )
        free = [_Slot(self.plan.micro_size, self.split.size, self.device) for _ in range(self.prefetch + 1)]
        ahead: deque[tuple[_Slot, int, int, np.ndarray, list[Future[None]]]] = deque()
        try:
            while True:
                while free and (planned := next(todo, None)) is not None:
                    step, micro, numbers = planned
                    slot = free.pop()
                    slot.wait()
                    fill = [
                        self._pool.submit(slot.fill, place, self.split, int(number))
                        for place, number in enumerate(numbers)
                    ]
                    ahead.append((slot, step, micro, numbers, fill))
                if not ahead:
                    return
                slot, step, micro, numbers, fill = ahead.popleft()
                for future in fill:
                    future.result()  # raises what the worker raised
                images, masks = slot.to(self.device)
                yield Batch(
                    images=images,
                    masks=masks,
                    numbers=numbers,
                    last=micro == self.plan.accumulation_steps,
                    step_samples=self.plan.samples_in_step(len(order), step),
                )
                free.append(slot)
        finally:
            for *_, fill in ahead:
                for future in fill:
                    future.cancel()
