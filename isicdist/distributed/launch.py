"""Start of a process under `accelerate launch`: launch checks, device, precision, and its end with the launcher."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, str_to_bool

from shards.errors import UsageError

_HINT = "start with: accelerate launch --config_file launch/cpu2.yaml (or gpu8.yaml) ..."
_PR_SET_PDEATHSIG = 1
LAUNCHER_GONE = getattr(signal, "SIGRTMIN", signal.SIGTERM)
"""What the kernel is asked to send when the launcher has died: nobody else sends it."""


def start(timeout: float = 600) -> Accelerator:
    """The Accelerator of this process: the GPU that is its own, or the CPU where there is none or none is wanted.

    `timeout`: seconds after which an exchange between processes that one of them has not joined fails.

    A CPU without instructions for bf16 computes in float32 where bf16 is asked for, and that is said.
    Raises UsageError when the launcher meant more processes than take part, or fp16 is asked of a CPU.
    """
    check_launch(os.environ)
    stop_with_launcher(os.environ)
    cpu = not torch.cuda.is_available() or bool(str_to_bool(os.environ.get("ACCELERATE_USE_CPU", "false")))
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if cpu and asked == "fp16":
        raise UsageError("fp16 needs a GPU; launch with --mixed_precision bf16 or no")
    if cpu:
        disable_malloc_trim()
    widened = cpu and asked == "bf16" and not cpu_has_bf16()
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision="no" if widened else None,  # None: as the launcher says
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))],
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise UsageError(_mismatch(launched, accelerator.num_processes))
    if widened:
        said = "this CPU has no instructions for bf16: computing in float32, which is faster on it"
        accelerator.on_main_process(print)(said, file=sys.stderr)
    return accelerator


def cpu_has_bf16() -> bool:
    """Whether this CPU has instructions for bf16, so that torch's convolutions are faster in it than in float32.

    Without AVX-512 torch does not even hand them to oneDNN: a training step took 11 times as long on a CPU with AVX2
    (`benchmarks/train_step.py`). On ARM the instructions are called bf16, too.
    """
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def check_launch(environment: Mapping[str, str]) -> None:
    """Raise UsageError for an environment in which accelerate would train alone, or wait for nobody.

    A real launch of several processes sets all four variables; a `WORLD_SIZE` left over in a shell has none of
    the others. `accelerate launch --cpu --num_processes 2` starts one process with `MASTER_ADDR` and no
    `WORLD_SIZE`.
    """
    launched = environment.get("WORLD_SIZE")
    if launched is None and "MASTER_ADDR" in environment:
        raise UsageError(f"the launcher started one process for several (--cpu does that, in silence); {_HINT}")
    if launched not in (None, "1") and not {"RANK", "LOCAL_RANK", "MASTER_ADDR"} <= environment.keys():
        raise UsageError(_mismatch(launched, 1))


def _mismatch(launched: int | str | None, taken_up: int) -> str:
    return (
        f"WORLD_SIZE is {launched}, but accelerate has set up {taken_up} process(es), so each would train alone; "
        f"{_HINT}, or unset WORLD_SIZE"
    )


def stop_with_launcher(environment: Mapping[str, str]) -> None:
    """Have the kernel send LAUNCHER_GONE when the launcher above this process has died.

    It ends the process, unless a `StopSignal` hears it. Linux alone has it. A process without a launcher is left
    alone: it may well outlive the shell it began in.
    """
    launched = {"TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND"} & environment.keys()  # of several, of one
    if launched and sys.platform == "linux":
        launcher = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, LAUNCHER_GONE)
        if os.getppid() != launcher:  # it was gone before the kernel knew
            os.kill(os.getpid(), LAUNCHER_GONE)


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def disable_malloc_trim() -> None:
    """Have glibc keep the memory that this process frees; elsewhere nothing is changed.

    It would give the activations of every step back to the kernel and take them anew, page by page: on a CPU a step
    took an eighth longer for that. The process never shrinks below its peak, which the next step needs again.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
