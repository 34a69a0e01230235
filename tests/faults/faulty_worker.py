"""`isicdist` with a fault in one rank: python faulty_worker.py FAULT[@MOMENT] FIRST LAST ARGUMENTS...

The fault comes with the calls FIRST to LAST (from 1) of what MOMENTS names, by default the micro batches, on rank 1 or
on the only rank there is; in a save on rank 0, which alone saves.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import isicdist.train
import isicdist.training.checkpoint
import isicdist.training.scoring
from isicdist.cli import main
from isicdist.distributed.agree import StopSignal
from shards.errors import CorruptShardError

MOMENTS = {
    "start": (isicdist.train, "plan_batches"),
    "step": (isicdist.train, "segmentation_loss"),
    "evaluation": (isicdist.training.scoring, "predict_probs"),
    "save": (isicdist.training.checkpoint, "save_weights"),
}
"""Functions during whose calls a fault can come: their module and name."""
PAUSE_SECONDS = 1.0


def out_of_memory(losses: Tensor) -> Tensor:
    if len(losses) > 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
    return losses


def nan(losses: Tensor) -> Tensor:
    return losses * float("nan")


def kill(result: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)
    return result


def freeze(result: Any) -> Any:
    os.kill(os.getpid(), signal.SIGSTOP)
    return result


def stop(result: Any) -> Any:
    os.kill(os.getpid(), signal.SIGTERM)
    return result


def corrupt(result: Any) -> Any:
    raise CorruptShardError("000003.tar: ISIC_0000007.jpg is damaged")


def hang(result: Any) -> Any:
    time.sleep(600)
    return result


def pause(result: Any) -> Any:
    time.sleep(PAUSE_SECONDS)
    return result


FAULTS: dict[str, Callable[[Any], Any]] = {
    fault.__name__: fault for fault in (out_of_memory, nan, kill, freeze, stop, corrupt, hang, pause)
}


def with_fault(function: Callable[..., Any], fault: Callable[[Any], Any], first: int, last: int) -> Callable[..., Any]:
    calls = 0

    def faulty(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        result = function(*arguments, **options)
        if first <= calls <= last:
            print("here comes the fault", flush=True)
            return fault(result)
        return result

    return faulty


if __name__ == "__main__":
    fault, first, last, *arguments = sys.argv[1:]
    fault, _, moment = fault.partition("@")
    torch.set_default_dtype(getattr(torch, os.environ.get("DTYPE", "float32")))
    rank = os.environ.get("RANK")
    if rank is None or rank == ("0" if moment == "save" else "1"):
        module, name = MOMENTS[moment or "step"]
        setattr(module, name, with_fault(getattr(module, name), FAULTS[fault], int(first), int(last)))
    StopSignal.REPEAT_SECONDS = 1.0
    main(arguments)
