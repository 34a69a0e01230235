"""Sizes of a step: images that the network can train on, and micro batches.

Micro batches begin with all that fits and are halved on out-of-memory (OOM); the global batch stays as it is.
accelerate's `find_executable_batch_size` restarts the whole function on OOM; here the step alone is repeated.
"""

from __future__ import annotations

import dataclasses
from types import TracebackType
from typing import Literal, Self

import torch
from accelerate.utils.memory import clear_device_cache

from isicdist.config import BatchConfig
from isicdist.data.order import BatchPlan, ceil_div
from isicdist.errors import TrainingError
from isicdist.network.unet import SIZE_DIVISOR
from shards.errors import UsageError
from shards.reader import Split

MIN_SIDE = 2 * SIZE_DIVISOR
"""Least side of a training image, in pixels: instance norm needs more than one element in the lowest map."""
CPU_PIXELS = 2**20
"""Pixels of a micro batch that `auto` starts with on a CPU: 64 images of 128 x 128 or 4 of 512 x 512, for which the
network needs about 3 GB in float32. More is no faster there, and on a CPU the kernel's OOM killer ends the process
instead of raising an error."""

EVALUATION_MICRO_SIZE = 16
"""Images of one forward pass of an evaluation where they are small."""
EVALUATION_PIXELS = 2**22
"""Pixels of one forward pass of an evaluation on a GPU, at most: 16 images of 512 x 512. CPU_PIXELS on a CPU."""

_OUT_OF_MEMORY = (
    "out of memory",  # CUDA error: out of memory, as when a kernel is loaded lazily
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # its handle finds no room
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "unable to find an engine to execute this computation",  # cuDNN: no workspace fits; or a GPU it does not know
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED.",  # a tensor too large for it; accelerate's list has this one, too
    "DefaultCPUAllocator: can't allocate memory",
)


def check_split(split: Split, world_size: int) -> int:
    """Return the side of the images in pixels. UsageError when `world_size` processes cannot train on the split."""
    if world_size > len(split):
        raise UsageError(f"{world_size} processes for {len(split)} training samples; start at most {len(split)}")
    if split.size is None:
        raise UsageError(f"{split.location}: its images differ in size; build a set for training with --size N")
    if split.size % SIZE_DIVISOR or split.size < MIN_SIDE:
        raise UsageError(
            f"{split.location}: images of {split.size} pixels, but the network needs multiples of {SIZE_DIVISOR} from "
            f"{MIN_SIDE} on; build with --size {max(MIN_SIDE, split.size // SIZE_DIVISOR * SIZE_DIVISOR)}"
        )
    return split.size


def training_side(side: int, *, small: bool) -> int:
    """Choose the side that images of `side` pixels are trained at: theirs, or about three quarters of it."""
    return max(MIN_SIDE, side * 3 // 4 // SIZE_DIVISOR * SIZE_DIVISOR) if small else side


def plan_batches(batch: BatchConfig, world_size: int, side: int, device: torch.device) -> BatchPlan:
    """Cut the global batch into micro batches for `world_size` processes; `side` of the square images in pixels."""
    share = ceil_div(batch.global_size, world_size)
    asked = batch.micro_size
    micro = initial_micro_size(share, side, device) if asked == "auto" else min(asked, share)
    return BatchPlan(global_size=batch.global_size, micro_size=micro, world_size=world_size)


def initial_micro_size(share: int, side: int, device: torch.device) -> int:
    """Choose what `auto` starts with: the rank's whole `share` of the global batch, on a CPU at most CPU_PIXELS.

    `side`: of the square images, in pixels.
    """
    return share if device.type != "cpu" else max(1, min(share, CPU_PIXELS // side**2))


def evaluation_micro_size(asked: int | Literal["auto"], side: int, device: torch.device) -> int:
    """Choose the images of one forward pass of an evaluation, the same for any number of processes.

    `asked`: the size of micro batches in training, at most which it is. `side`: of the square images, in pixels.
    """
    pixels = CPU_PIXELS if device.type == "cpu" else EVALUATION_PIXELS
    most = EVALUATION_MICRO_SIZE if asked == "auto" else min(asked, EVALUATION_MICRO_SIZE)
    return max(1, min(most, pixels // side**2))


def is_out_of_memory(error: BaseException) -> bool:
    """Recognise an out-of-memory error of torch, CUDA, cuBLAS, cuDNN or NCCL, or of the host's allocator."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


class OomGuard:
    """Catch out-of-memory errors of a micro batch, for all ranks to vote on. Use it as a context around each one."""

    def __init__(self) -> None:
        self.tripped = False
        """This rank has run out of memory since the micro batches were last halved."""
        self._error = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None or not is_out_of_memory(error):
            return False
        self.tripped, self._error = True, str(error).partition("\n")[0]
        return True

    def halve_micro_batch(self, plan: BatchPlan, asked: int | Literal["auto"]) -> BatchPlan:
        """Give the plan with micro batches of half the size, and so twice as many. Every rank calls it, after a vote.

        Raises TrainingError on every rank when `asked`, the configured size, is not auto, or is down to 1 sample.
        """
        if plan.micro_size == 1:
            said = f" ({self._error})" if self._error else ""  # by this rank, or by another one
            raise TrainingError(f"out of memory with 1 sample at once{said}: train on smaller images, or in bf16")
        if asked != "auto":
            raise TrainingError(
                f"out of memory with {asked} samples at once on a rank: use --batch.micro-size auto or a smaller one"
            )
        self.tripped = False
        torch.compiler.reset()  # or the graphs of several sizes use up the limit of recompilations
        clear_device_cache(garbage_collection=True)
        return dataclasses.replace(plan, micro_size=ceil_div(plan.micro_size, 2))
