"""Starting on however many processes there are, and refusing a launch that is not what it looks like."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.utils import str_to_bool

from shards.errors import UsageError


def start() -> Accelerator:
    """The Accelerator of this process: the GPU that is its own, or the CPU where there is none or none is wanted.

    Raises UsageError when the launcher started more processes than take part, or fp16 is asked of a CPU.
    """
    cpu = not torch.cuda.is_available() or bool(str_to_bool(os.environ.get("ACCELERATE_USE_CPU", "false")))
    if cpu and os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16":
        raise UsageError("fp16 needs a GPU; launch with --mixed_precision bf16 or no")
    accelerator = Accelerator(cpu=cpu)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise UsageError(
            f"WORLD_SIZE is {launched}, but accelerate has set up {accelerator.num_processes} process(es), so each "
            "would train alone; start with: accelerate launch --config_file launch/cpu2.yaml (or gpu8.yaml) ..., "
            "or unset WORLD_SIZE"
        )
    return accelerator
