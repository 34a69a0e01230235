"""Order + reader + parallel decoding -> batches on the device.

Samples are decoded by threads (the codecs release the GIL) straight into slots: memory that is allocated once,
pinned where there is CUDA, `prefetch` micro batches ahead. The order is planned (`isicdist.data.order`), so nothing is
negotiated between ranks or workers, and the state of a stream is a few integers.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import NamedTuple, Self, TypedDict

import numpy as np
import torch
from torch import Tensor

from isicdist.data.decoded_cache import DecodedCache
from isicdist.data.order import MASKED, BatchPlan, epoch_order, num_steps, rank_slice
from isicdist.errors import CheckpointError
from shards.errors import UsageError
from shards.reader import Split


class StreamState(TypedDict):
    """Position of a stream, and what its order depends on."""

    digest: str
    """Digest of the shard set."""
    seed: int
    window: int | None
    """Shards shuffled together; None: all."""
    epoch: int
    consumed: int
    """Samples of the epoch that all ranks together have trained on."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro batch of one rank. On a CPU the tensors are valid until the next batch is requested."""

    images: Tensor
    """uint8 (B, 3, H, W) on the device; zeros in masked slots."""
    masks: Tensor
    """uint8 (B, 1, H, W) on the device, 1 where the lesion is."""
    indices: np.ndarray
    """Sample indices, int64 (B,) on the host; -1 in masked slots."""
    ids: Tensor
    """The same on the device."""
    step_samples: int
    """Samples of the whole step over all ranks: the loss is a mean over them."""

    @property
    def valid(self) -> Tensor:
        """Slots that hold a sample, bool (B,) on the device."""
        return self.ids != MASKED


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step of a stream: iterate over it for this rank's micro batches (gradient accumulation)."""

    start: StreamState
    """State of the stream before the step; load it to repeat the step."""
    samples: int
    """Samples of the step over all ranks."""
    micro_batches: Iterator[Batch]

    def __iter__(self) -> Iterator[Batch]:
        return self.micro_batches


Decode = Callable[[int, np.ndarray, np.ndarray], None]
"""Decodes a sample, by its index, into an image (H, W, 3) and a mask (H, W)."""


Advance = Callable[[int], None]
"""Says how far a pass over a split has come (`Split.start_pass`)."""


class _Planned(NamedTuple):
    """One micro batch to come."""

    advance: Advance
    step: int
    """Step of the epoch."""
    indices: np.ndarray
    """Sample indices, int64 (B,); -1 in masked slots."""


class _Slot:
    """Host memory for one micro batch, reused; pinned for a GPU, which copies it on a stream of its own."""

    def __init__(self, size: int, side: int, device: torch.device, upload: torch.cuda.Stream | None) -> None:
        # Allocated by NumPy, which asks for huge pages: decoding into them takes a tenth less time.
        self.images = torch.from_numpy(np.zeros((size, side, side, 3), dtype=np.uint8))
        self.masks = torch.from_numpy(np.zeros((size, side, side), dtype=np.uint8))
        self.ids = torch.zeros(size, dtype=torch.int64)
        self.device, self.upload = device, upload
        self.copied = None
        if upload:
            self.images, self.masks, self.ids = (each.pin_memory() for each in (self.images, self.masks, self.ids))
            self.copied = torch.cuda.Event(blocking=True)
        self.image_view, self.mask_view, self.ids_view = self.images.numpy(), self.masks.numpy(), self.ids.numpy()

    def fill(self, positions: range, indices: np.ndarray, decode: Decode) -> None:
        """Decode the samples at some positions of a micro batch whose sample indices are `indices` (B,).

        Runs on a worker thread, which waits there until the device has its copy of the slot's last content.
        """
        if self.copied:
            self.copied.synchronize()
        for position in positions:
            image, mask = self.image_view[position], self.mask_view[position]
            self.ids_view[position] = indices[position]
            if indices[position] == MASKED:
                image[:], mask[:] = 0, 0
            else:
                decode(int(indices[position]), image, mask)

    def to_device(self) -> tuple[Tensor, Tensor, Tensor]:
        """Copy images (B, H, W, 3), masks (B, H, W) and ids (B,) to the device, without waiting for it."""
        contents = self.images, self.masks, self.ids
        if not self.upload or not self.copied:
            return tuple(each.to(self.device) for each in contents)  # pyright: ignore[reportReturnType]
        with torch.cuda.stream(self.upload):
            copies = tuple(each.to(self.device, non_blocking=True) for each in contents)
            self.copied.record()
        compute = torch.cuda.current_stream(self.device)
        compute.wait_event(self.copied)
        for each in copies:
            each.record_stream(compute)  # or the allocator could reuse it before the step is done
        return copies  # pyright: ignore[reportReturnType]


class Stream:
    """Batches of one split on one rank. Use it as a context manager: it owns threads."""

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
        """Open a stream at the start of epoch 0.

        `window`: shards shuffled together (None: all). `workers`: decoding threads. `prefetch`: micro batches decoded
        ahead. `decoded`: cache of the decoded samples of `split`. Raises UsageError for images that differ in size.
        """
        if split.size is None:
            raise UsageError(f"{split.location}: its images differ in size; build a set for training with --size N")
        self.split, self._plan, self.rank = split, plan, rank
        self.seed, self.window, self.prefetch = seed, self._effective(window), prefetch
        self.device = torch.device(device)
        if str(self.device) == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device())  # another thread has its own
        self.epoch_number = 0
        self.consumed = 0
        """Samples of the epoch that all ranks together have been given."""
        self._decode: Decode = decoded.read if decoded else split.sample
        self._workers = workers
        on_gpu = self.device.type == "cuda"
        self._pool = ThreadPoolExecutor(workers, "decode", self._begin_thread)
        self._upload = torch.cuda.Stream(self.device) if on_gpu else None
        self._slots: list[_Slot] = []
        self._next_epoch: Generator[Batch, None, None] | None = None
        """The batches of the next epoch, the first of which are decoded already."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._forget_next_epoch()
        self._pool.shutdown(wait=True, cancel_futures=True)

    @property
    def plan(self) -> BatchPlan:
        """Division of the global batch; set another one between two epochs, or before `load_state_dict`."""
        return self._plan

    @plan.setter
    def plan(self, plan: BatchPlan) -> None:
        self._forget_next_epoch()
        self._plan = plan

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one epoch, the short last one included."""
        return num_steps(len(self.split), self.plan.global_size)

    def steps_left(self, epochs: int) -> int:
        """Count the steps from here to the end of `epochs` epochs."""
        done = self.consumed // self.plan.global_size
        return max(0, (epochs - self.epoch_number) * self.steps_per_epoch - done)

    def state_dict(self) -> StreamState:
        """Give the position of the stream: a few integers, whatever the size of the set."""
        return {
            "digest": self.split.digest,
            "seed": self.seed,
            "window": self.window,
            "epoch": self.epoch_number,
            "consumed": self.consumed,
        }

    def load_state_dict(self, state: StreamState) -> None:
        """Continue at the position of `state`. Raises CheckpointError when it belongs to another set or order."""
        saved = {**state, "window": self._effective(state["window"])}
        for name, own in (("digest", self.split.digest), ("seed", self.seed), ("window", self.window)):
            if saved[name] != own:
                setting = "--stream.window" if name == "window" else name
                raise CheckpointError(
                    f"the checkpoint was trained with {setting} {saved[name]}, this run has {own}; "
                    "train in a new run folder, or go back to the old value"
                )
        if state["consumed"] % self.plan.global_size:
            raise CheckpointError(
                f"{state['consumed']} samples of the epoch are no whole number of steps of "
                f"{self.plan.global_size} samples; go on with the checkpoint's batch.global_size"
            )
        self._forget_next_epoch()
        self.epoch_number, self.consumed = state["epoch"], state["consumed"]

    def steps(self) -> Iterator[Step]:
        """Yield the remaining steps of this epoch, then move on to the next epoch.

        The state of the stream is behind a step as soon as its last micro batch has been processed.
        """
        first = self.consumed // self.plan.global_size
        batches, self._next_epoch = self._next_epoch or self._batches(self._orders(), first), None
        try:
            for step in range(first, self.steps_per_epoch):
                samples = self.plan.samples_in_step(len(self.split), step)
                yield Step(
                    start=self.state_dict(), samples=samples, micro_batches=self._micro_batches(batches, samples)
                )
            if not self.consumed and not self.split.cached_set:  # whose batches end with the epoch
                self._next_epoch = batches
        finally:
            if batches is not self._next_epoch:
                batches.close()

    def epoch(self) -> Iterator[Batch]:
        """Yield the remaining micro batches of this epoch: `steps`, for a loop without gradient accumulation."""
        for step in self.steps():
            yield from step

    def step_sample_names(self, start: StreamState) -> list[str]:
        """Give the sample keys (ISIC ids) of the whole step that begins at `start`."""
        order = epoch_order(self.split, self.seed, start["epoch"], self.window)
        return [self.split.key(index) for index in order[start["consumed"] :][: self.plan.global_size]]

    def sequential_pass(self) -> Generator[Batch, None, None]:
        """Yield every sample of the split once over all ranks, in the order of the table: for evaluation."""
        return self._batches([np.arange(len(self.split))], 0)

    def _orders(self) -> Iterator[np.ndarray]:
        """Yield the orders of this epoch and those after it; one of a remote set, whose shards are fetched by epoch."""
        epochs = itertools.count(self.epoch_number)
        for epoch in itertools.islice(epochs, 1) if self.split.cached_set else epochs:
            yield epoch_order(self.split, self.seed, epoch, self.window)

    def _forget_next_epoch(self) -> None:
        if self._next_epoch:
            self._next_epoch.close()
            self._next_epoch = None

    def _micro_batches(self, batches: Iterator[Batch], samples: int) -> Iterator[Batch]:
        """Yield the micro batches of one step, then count its samples as consumed."""
        for _ in range(self.plan.accumulation_steps):
            yield next(batches)  # an early end is an error (PEP 479), and no shorter step
        self.consumed += samples
        if self.consumed == len(self.split):
            self.epoch_number, self.consumed = self.epoch_number + 1, 0

    def _batches(self, orders: Iterable[np.ndarray], first: int) -> Generator[Batch, None, None]:
        """Yield this rank's micro batches in one pass over each of `orders`; of the first one from step `first` on."""
        planned = self._planned(orders, first)
        slots = self._take_slots()
        free, ahead = deque(slots), deque[tuple[_Slot, _Planned, list[Future[None]]]]()

        def fill_free_slots() -> None:
            while free and (following := next(planned, None)) is not None:
                slot = free.popleft()
                ahead.append((slot, following, self._fill(slot, following.indices)))

        advance: Advance | None = None
        try:
            fill_free_slots()
            while ahead:
                slot, (advance, step, indices), filling = ahead[0]
                for future in filling:
                    future.result()  # raises what the worker raised
                ahead.popleft()
                advance(step * self.plan.global_size)
                images, masks, ids = slot.to_device()
                fill_free_slots()  # not before: the workers compete with this thread for the interpreter
                yield Batch(
                    images=images.permute(0, 3, 1, 2),  # (B, 3, H, W)
                    masks=masks[:, None],  # (B, 1, H, W)
                    indices=indices,
                    ids=ids,
                    step_samples=self.plan.samples_in_step(len(self.split), step),
                )
                free.append(slot)
        finally:
            wait([future for *_, filling in ahead for future in filling if not future.cancel()])
            self._slots = slots
            if advance:
                advance(len(self.split))

    def _planned(self, orders: Iterable[np.ndarray], first: int) -> Iterator[_Planned]:
        for order in orders:
            advance = self.split.start_pass(order)
            advance(first * self.plan.global_size)
            for step in range(first, self.steps_per_epoch):
                for indices in rank_slice(order, step, self.plan, self.rank):
                    yield _Planned(advance, step, indices)
            first = 0

    def _effective(self, window: int | None) -> int | None:
        """Give None for a window that covers the whole split, whose order is the same."""
        return None if window is None or window >= len(self.split.entries) else window

    def _fill(self, slot: _Slot, indices: np.ndarray) -> list[Future[None]]:
        """Decode the samples of a micro batch into `slot`, a part of them on each worker thread."""
        parts = [range(worker, len(indices), self._workers) for worker in range(min(self._workers, len(indices)))]
        return [self._pool.submit(slot.fill, part, indices, self._decode) for part in parts]

    def _begin_thread(self) -> None:
        """Tell a worker thread its GPU: to wait for an event, it would make a context on GPU 0."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def _take_slots(self) -> list[_Slot]:
        """Reuse the slots of the previous pass, unless the micro batch has another size now."""
        size, side = self.plan.micro_size, self.split.size
        assert side is not None
        reusable = [slot for slot in self._slots if len(slot.images) == size]
        self._slots = []
        return reusable or [_Slot(size, side, self.device, self._upload) for _ in range(self.prefetch + 1)]
