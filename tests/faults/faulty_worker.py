"""`isicdist` with a fault in one rank: python faulty_worker.py FAULT FIRST LAST ARGUMENTS...

The fault comes with the micro batches FIRST to LAST (from 1) of rank 1, or of the only rank there is.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

import isicdist.train
from isicdist.cli import main
from isicdist.distributed.agree import StopSignal
from shards.errors import CorruptShardError


def out_of_memory(losses: Tensor) -> Tensor:
    if len(losses) > 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
    return losses


def nan(losses: Tensor) -> Tensor:
    return losses * float("nan")


def kill(losses: Tensor) -> Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    return losses


def stop(losses: Tensor) -> Tensor:
    os.kill(os.getpid(), signal.SIGTERM)
    return losses


def corrupt(losses: Tensor) -> Tensor:
    raise CorruptShardError("000003.tar: ISIC_0000007.jpg is damaged")


def hang(losses: Tensor) -> Tensor:
    time.sleep(600)
    return losses


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    fault.__name__: fault for fault in (out_of_memory, nan, kill, stop, corrupt, hang)
}


def with_fault(fault: Callable[[Tensor], Tensor], first: int, last: int) -> Callable[..., Tensor]:
    loss, calls = isicdist.train.segmentation_loss, 0

    def faulty(*args: object) -> Tensor:
        nonlocal calls
        calls += 1
        losses = loss(*args)  # pyright: ignore[reportArgumentType]
        return fault(losses) if first <= calls <= last else losses

    return faulty


if __name__ == "__main__":
    fault, first, last, *arguments = sys.argv[1:]
    torch.set_default_dtype(getattr(torch, os.environ.get("DTYPE", "float32")))
    if os.environ.get("RANK", "1") == "1":
        isicdist.train.segmentation_loss = with_fault(FAULTS[fault], int(first), int(last))
    StopSignal.REPEAT_SECONDS = 1.0
    main(arguments)
