"""Starting on however many processes there are, and stopping together when one of them gets a signal."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any, Self

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


class StopSignal:
    """SIGTERM, SIGUSR1 or SIGINT on any rank, agreed on by all. Use it as a context manager around the loop.

    A second signal does what it would have done without us: the process ends at once.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._told = False
        self._asked: torch.Tensor | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._hear) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def agreed(self) -> bool:
        """Whether a rank had been told to stop when this was last called; the same on every rank.

        Each call asks (a sum of one integer) and reads the answer of the call before it, so that no device is
        waited for. Every rank calls it once per step.
        """
        answer = self._asked
        told = torch.tensor([int(self._told)], device=self._accelerator.device)
        self._asked = torch.as_tensor(self._accelerator.reduce(told, "sum"))
        return answer is not None and bool(answer.item())

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._told = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
