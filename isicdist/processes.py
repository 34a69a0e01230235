"""Starting on however many processes there are, and refusing a launch that is not what it looks like."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import str_to_bool

from shards.errors import UsageError

_WAY_OUT = "start with: accelerate launch --config_file launch/cpu2.yaml (or gpu8.yaml) ..."


def start() -> Accelerator:
    """The Accelerator of this process: the GPU that is its own, or the CPU where there is none or none is wanted.

    Raises UsageError when the launcher meant more processes than take part, or fp16 is asked of a CPU.
    """
    check_launch(os.environ)
    cpu = not torch.cuda.is_available() or bool(str_to_bool(os.environ.get("ACCELERATE_USE_CPU", "false")))
    if cpu and os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16":
        raise UsageError("fp16 needs a GPU; launch with --mixed_precision bf16 or no")
    accelerator = Accelerator(cpu=cpu)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise UsageError(_mismatch(launched, accelerator.num_processes))
    return accelerator


def check_launch(environment: Mapping[str, str]) -> None:
    """Raise UsageError for an environment in which accelerate would train alone, or wait for nobody.

    A real launch of several processes sets all four variables; a `WORLD_SIZE` left over in a shell has none of
    the others. `accelerate launch --cpu --num_processes 2` starts one process with `MASTER_ADDR` and no
    `WORLD_SIZE`.
    """
    launched = environment.get("WORLD_SIZE")
    if launched is None and "MASTER_ADDR" in environment:
        raise UsageError(f"the launcher started one process for several (--cpu does that, in silence); {_WAY_OUT}")
    if launched not in (None, "1") and not {"RANK", "LOCAL_RANK", "MASTER_ADDR"} <= environment.keys():
        raise UsageError(_mismatch(launched, 1))


def _mismatch(launched: int | str | None, taken_up: int) -> str:
    return (
        f"WORLD_SIZE is {launched}, but accelerate has set up {taken_up} process(es), so each would train alone; "
        f"{_WAY_OUT}, or unset WORLD_SIZE"
    )
