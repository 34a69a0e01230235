"""Start of a process under `accelerate launch`: launch checks, device, precision, and its end with the launcher."""

from __future__ import annotations

import atexit
import ctypes
import importlib
import os
import shutil
import signal
import sys
import sysconfig
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, broadcast_object_list
from torch.utils._triton import has_triton

from isicdist.config import Precision
from isicdist.distributed.attempts import init_method
from isicdist.distributed.environment import LaunchEnvironment, read_environment, world_size_mismatch
from isicdist.distributed.interface import choose_gloo_interface
from isicdist.distributed.lost_ranks import publish_host
from shards.errors import UsageError
from shards.parallel.malloc import M_MMAP_MAX, M_TRIM_THRESHOLD, set_malloc
from shards.parallel.processes import available_cores

_PR_SET_PDEATHSIG = 1
LAUNCHER_GONE = getattr(signal, "SIGRTMIN", signal.SIGTERM)
"""Signal that the kernel sends when the launcher has died: nobody else sends it."""
MAX_IDLE_SECONDS = 7 * 24 * 3600
"""Timeout of commands that do not train: a rank that has finished its share waits for the others."""
MAX_DECODING_THREADS = 8
"""More threads than this only take the GIL from the one that launches kernels."""


def start(timeout: float = 600, *, probe_cpu: Callable[[], Precision] | None = None) -> Accelerator:
    """Make the Accelerator of this process: on the GPU of its local rank, or on the CPU.

    `timeout`: seconds after which a collective that some process has not joined fails. `probe_cpu`: measures which
    precision this CPU computes faster in, where bf16 is requested; the main process decides for all.

    Raises UsageError for an environment that `read_environment` refuses, for more processes than GPUs, when the
    launcher meant more processes than take part, and for fp16 on a CPU.
    """
    launched = read_environment(os.environ)
    stop_with_launcher(os.environ)
    cpu = not torch.cuda.is_available() or launched.use_cpu
    _check_devices(launched, cpu=cpu)
    if cpu:
        disable_malloc_trim()
    choose_gloo_interface(os.environ, world_size=launched.world_size, local_world_size=launched.local_world_size)
    # accelerate hands on only what differs from its defaults, and 600 s is one of them.
    limit = timedelta(seconds=timeout, milliseconds=1)
    handler = InitProcessGroupKwargs(timeout=limit, init_method=init_method(os.environ))
    # Imported later, as torch._dynamo does, its functions would hold the process group as a default argument: gloo's
    # threads would outlive the group, and may abort the process at its end.
    importlib.import_module("torch.distributed.nn.functional")
    state = PartialState(cpu=cpu, **handler.to_kwargs())
    atexit.register(_destroy_gloo_group)
    publish_host()
    precision = launched.mixed_precision
    if cpu and precision == "bf16" and probe_cpu:
        precision = broadcast_object_list([probe_cpu() if state.is_main_process else None])[0]
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=precision,
        kwargs_handlers=[handler],
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        step_scheduler_with_optimizer=False,
    )
    if launched.world_size != accelerator.num_processes:
        raise UsageError(world_size_mismatch(launched.world_size, accelerator.num_processes))
    for line in _precision_notes(launched, accelerator):
        accelerator.on_main_process(print)(line, file=sys.stderr)
    return accelerator


def _destroy_gloo_group() -> None:
    """End gloo's threads, which may abort a process that ends by an error. NCCL would wait for other ranks.

    `AnyRank` ends its own group.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


def _check_devices(launched: LaunchEnvironment, *, cpu: bool) -> None:
    if cpu:
        if launched.mixed_precision == "fp16":
            raise UsageError("fp16 needs a GPU; launch with --mixed_precision bf16 or no")
    elif launched.local_world_size > (gpus := torch.cuda.device_count()):
        raise UsageError(
            f"{launched.local_world_size} processes on this machine, which has {gpus} GPU(s): NCCL wants one for each; "
            f"launch with --num_processes {gpus}, or with ACCELERATE_USE_CPU=true on the CPU"
        )


def _precision_notes(launched: LaunchEnvironment, accelerator: Accelerator) -> list[str]:
    """Give the lines to print where the precision is not what its name promises."""
    if accelerator.device.type == "cpu":
        changed = launched.mixed_precision != accelerator.mixed_precision
        return ["bf16 is slower than float32 on this CPU: computing in float32"] if changed else []
    notes: list[str] = []
    if accelerator.mixed_precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        notes.append("this GPU only emulates bf16, slowly: launch with --mixed_precision fp16")
    if accelerator.mixed_precision == "no" and computes_tf32(accelerator.device):
        notes.append("convolutions compute in TF32 here (10 bits of mantissa); NVIDIA_TF32_OVERRIDE=0 turns it off")
    return notes


def decoding_threads(asked: int | Literal["auto"], device: torch.device) -> int:
    """Choose the number of decoding threads of a rank that trains on `device`."""
    if asked != "auto":
        return asked
    return 2 if device.type == "cpu" else min(MAX_DECODING_THREADS, worker_threads())


def decide_compile(setting: Literal["auto", "on", "off"], device: torch.device) -> tuple[bool, str]:
    """Decide about torch.compile on `device`; returns True to compile, and the line that says what is done and why."""
    lacking = lacking_for_compile(device)
    if setting == "on" or (setting == "auto" and not lacking):
        return True, "network: compiled; the first step takes longer"
    return False, f"network: not compiled: {lacking if setting == 'auto' else '--compile off'}"


def lacking_for_compile(device: torch.device) -> str | None:
    """Name what torch.compile lacks on this device, with a remedy; None where it has all and pays.

    It pays on a GPU. There Triton builds a launcher for its kernels, by $CC, gcc or clang and with Python's headers.
    """
    if device.type != "cuda":
        return "it pays on a GPU only"
    if not has_triton():
        return "torch finds no Triton for this GPU"
    chosen = os.environ.get("CC")
    if chosen is not None and not shutil.which(chosen):
        return f"CC={chosen} is not a program: unset it, or set the path of a C compiler"
    if chosen is None and not any(map(shutil.which, ("gcc", "clang"))):
        return "no C compiler: install gcc and libc6-dev, or set CC"
    scheme = sysconfig.get_default_scheme()
    include = sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme)
    if not Path(include, "Python.h").is_file():
        return f"no Python.h in {include}: install Python's headers (Debian: python3-dev)"
    return None


def computes_tf32(device: torch.device) -> bool:
    """Tell whether convolutions in float32 are computed in TF32 on this device (Ampere and later, by default)."""
    if device.type != "cuda" or os.environ.get("NVIDIA_TF32_OVERRIDE") == "0":
        return False
    return torch.backends.cudnn.allow_tf32 and torch.cuda.get_device_capability(device) >= (8, 0)


def worker_threads() -> int:
    """Count the threads that decode and encode on this rank: its share of the cores of its machine, at least 2."""
    return max(2, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def stop_with_launcher(environ: Mapping[str, str]) -> None:
    """Have the kernel send LAUNCHER_GONE when the launcher above this process has died. Linux only.

    It ends the process, unless a `StopSignal` handles it. A process without a launcher may outlive its shell.
    """
    launched = {"TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND"} & environ.keys()  # of several, of one
    if launched and sys.platform == "linux":
        launcher = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, LAUNCHER_GONE)
        if os.getppid() != launcher:  # it was gone before the kernel knew
            os.kill(os.getpid(), LAUNCHER_GONE)


def disable_malloc_trim() -> None:
    """Have glibc cache the memory that this process frees; elsewhere nothing is changed.

    It would return the activations of every step to the kernel and fault them in again, page by page: on a CPU a step
    took an eighth longer. The process never shrinks below its peak, which the next step needs again.
    """
    set_malloc({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1})
