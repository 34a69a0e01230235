"""Order + reader + parallel decoding -> batches on the device.

Samples are decoded by threads (the codecs release the GIL) straight into slots: memory that is allocated once,
pinned where there is CUDA, `prefetch` micro batches ahead. The order is planned (`isicdist.data.order`), so nothing is
negotiated between ranks or workers, and the state of a stream is a few integers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from isicdist.data.decoded_cache import DecodedCache
from isicdist.data.order import MASKED, BatchPlan, epoch_order, num_steps, rank_slice
from isicdist.errors import CheckpointError
from shards.errors import UsageError
from shards.reader import Split


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro batch of one rank. On a CPU the tensors are valid until the next batch is asked for."""

    images: Tensor
    """uint8 (B, 3, H, W) on the device; zeros in masked places."""
    masks: Tensor
    """uint8 (B, 1, H, W) on the device, 1 where the lesion is."""
    indices: np.ndarray
    """Sample numbers, int64 (B,) on the host; -1 in masked places."""
    last: bool
    """Whether this is the rank's last micro batch of the step."""
    step_samples: int
    """Samples of the whole step over all ranks: what the loss is a mean over."""

    @property
    def valid(self) -> np.ndarray:
        """Which places hold a sample, bool (B,) on the host."""
        return self.indices != MASKED


Decode = Callable[[int, np.ndarray, np.ndarray], None]
"""Decodes a sample, by its number, into an image (H, W, 3) and a mask (H, W)."""


class _Slot:
    """OomGuard for one micro batch on the host, used again and again."""

    def __init__(self, size: int, side: int, device: torch.device) -> None:
        pin = device.type == "cuda"
        # Made by NumPy, which asks for huge pages: decoding into them takes a tenth less time.
        self.images = torch.from_numpy(np.zeros((size, side, side, 3), dtype=np.uint8))
        self.masks = torch.from_numpy(np.zeros((size, side, side), dtype=np.uint8))
        if pin:
            self.images, self.masks = self.images.pin_memory(), self.masks.pin_memory()
        self.image_view, self.mask_view = self.images.numpy(), self.masks.numpy()
        self.copied = torch.cuda.Event() if pin else None

    def fill(self, places: range, numbers: np.ndarray, decode: Decode) -> None:
        """Decode the samples of some places of a micro batch whose sample numbers are `numbers` (B,)."""
        for place in places:
            image, mask = self.image_view[place], self.mask_view[place]
            if numbers[place] == MASKED:
                image[:], mask[:] = 0, 0
            else:
                decode(int(numbers[place]), image, mask)

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
        prefetch: int = 2,
        device: torch.device | str = "cpu",
        decoded: DecodedCache | None = None,
    ) -> None:
        """`window`: shards shuffled together (None: all). `workers`: decoding threads. `prefetch`: batches ahead.

        `decoded`: where samples of `split` are kept as they are once they have been decoded.
        """
        if split.size is None:
            raise UsageError(f"{split.location}: its images differ in size; build a set for training with --size N")
        self.split, self.plan, self.rank = split, plan, rank
        self.seed, self.window, self.prefetch = seed, window, prefetch
        self.device = torch.device(device)
        self.epoch_number = 0
        self.consumed = 0
        """Samples of the epoch that all ranks together have been given."""
        self._decode: Decode = decoded.read if decoded else split.sample
        self._workers = workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        self._slots: list[_Slot] = []

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
            "window": self.window,
            "epoch": self.epoch_number,
            "consumed": self.consumed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` stood. Raises CheckpointError when it is of another set or order."""
        for name, own in (("digest", self.split.digest), ("seed", self.seed), ("window", self.window)):
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

    def in_order(self) -> Generator[Batch, None, None]:
        """Every sample of the split once over all ranks, in the order of the table: for evaluation."""
        return self._batches(np.arange(len(self.split)), 0)

    def _advance(self, samples: int) -> None:
        self.consumed += samples
        if self.consumed == len(self.split):
            self.epoch_number, self.consumed = self.epoch_number + 1, 0

    def _batches(self, order: np.ndarray, first: int) -> Generator[Batch, None, None]:
        planned = (
            (step, micro, numbers)
            for step in range(first, self.steps_per_epoch)
            for micro, numbers in enumerate(rank_slice(order, step, self.plan, self.rank), start=1)
        )
        reached = self.split.start_pass(order)
        reached(first * self.plan.global_size)
        slots = self._take_slots()
        free, ahead = deque(slots), deque[tuple[_Slot, int, int, np.ndarray, list[Future[None]]]]()
        try:
            while True:
                while free and (following := next(planned, None)) is not None:
                    slot = free.popleft()
                    slot.wait()
                    ahead.append((slot, *following, self._fill(slot, following[-1])))
                if not ahead:
                    return
                slot, step, micro, numbers, filling = ahead[0]
                for future in filling:
                    future.result()  # raises what the worker raised
                ahead.popleft()
                reached(step * self.plan.global_size)
                images, masks = slot.to(self.device)
                yield Batch(
                    images=images,
                    masks=masks,
                    indices=numbers,
                    last=micro == self.plan.accumulation_steps,
                    step_samples=self.plan.samples_in_step(len(order), step),
                )
                free.append(slot)
        finally:
            wait([future for *_, filling in ahead for future in filling if not future.cancel()])
            self._slots = slots
            reached(len(order))

    def _fill(self, slot: _Slot, numbers: np.ndarray) -> list[Future[None]]:
        """Have the samples of a micro batch decoded into `slot`, a part of them by each worker."""
        parts = [range(worker, len(numbers), self._workers) for worker in range(min(self._workers, len(numbers)))]
        return [self._pool.submit(slot.fill, part, numbers, self._decode) for part in parts]

    def _take_slots(self) -> list[_Slot]:
        """The slots for one pass: those of the pass before, unless the micro batch has another size now."""
        size, side = self.plan.micro_size, self.split.size
        assert side is not None
        kept = [slot for slot in self._slots if len(slot.images) == size]
        self._slots = []
        return kept or [_Slot(size, side, self.device) for _ in range(self.prefetch + 1)]
