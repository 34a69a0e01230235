"""How many samples go through the network at once: as many as fit. And memory that is freed stays ours."""

from __future__ import annotations

import dataclasses
from types import TracebackType
from typing import Literal, Self

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from isicdist.data.order import BatchPlan
from isicdist.errors import TrainingError

CPU_PIXELS = 2**20
"""Pixels of a micro batch that `auto` begins with on a CPU: 64 images of 128 x 128 or 4 of 512 x 512, for which the
network wants about 3 GB in float32. More is no faster there, and a system without memory kills a process unasked."""


def initial_micro_size(share: int, side: int, device: torch.device) -> int:
    """What `auto` begins with: the rank's whole `share` of the global batch, on a CPU at most CPU_PIXELS.

    `side`: of the square images, in pixels.
    """
    return share if device.type != "cpu" else max(1, min(share, CPU_PIXELS // side**2))


class OomGuard:
    """Notices when a rank runs out of memory, and cuts its micro batches. Use it around each of them."""

    def __init__(self) -> None:
        self.exhausted = False
        """Whether this rank has run out of memory since the last cut."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception) or not should_reduce_batch_size(error):
            return False
        self.exhausted = True
        return True

    def cut(self, plan: BatchPlan, asked: int | Literal["auto"]) -> BatchPlan:
        """The plan with micro batches of half the size, and so twice as many. Every rank calls it, after a vote.

        Raises TrainingError on every rank when `asked`, the configured size, is not auto, or is down to 1 sample.
        """
        if plan.micro_size == 1:
            raise TrainingError("out of memory with 1 sample at once: train on smaller images, or in bf16")
        if asked != "auto":
            raise TrainingError(
                f"out of memory with {asked} samples at once on a rank: use --batch.micro-size auto or a smaller one"
            )
        self.exhausted = False
        clear_device_cache(garbage_collection=True)
        return dataclasses.replace(plan, micro_size=-(-plan.micro_size // 2))
