"""Agreement between ranks: stop together on a signal, retry together, and notice a rank that is lost."""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Iterator
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from accelerate import Accelerator

from isicdist.distributed.launch import LAUNCHER_GONE
from isicdist.errors import TrainingError


@contextlib.contextmanager
def raise_on_lost_rank() -> Iterator[None]:
    """Turn an exchange that fails because another rank has gone or hangs into a TrainingError. Decorates a command."""
    try:
        yield
    except RuntimeError as error:
        said = re.search(r"gloo/\S*\] (.*?)(\. |$)", str(error), re.M)  # [.../gloo/.../pair.cc:553] Connection closed
        if not said and not isinstance(error, torch.distributed.DistError):
            raise
        raise TrainingError(
            f"another rank has gone or does not answer ({said[1] if said else error}); its own line or the launcher's "
            "report says which one and why; then start the same command again"
        ) from error


class AnyRank:
    """What any rank says, known to all at once: a sum of a few integers between the hosts, past all devices.

    It needs no device to have finished, and a rank that has died is noticed here whatever its device was doing.
    """

    def __init__(self, accelerator: Accelerator, timeout: float) -> None:
        """`timeout`: seconds to wait for the other ranks. Every rank makes one."""
        several = accelerator.num_processes > 1
        self._group = (
            torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) if several else None
        )

    def __call__(self, *flags: bool) -> tuple[bool, ...]:
        """Whether any rank says yes, for each of the `flags`. Every rank calls it."""
        if self._group is None:
            return flags
        votes = torch.tensor(flags, dtype=torch.int32)
        torch.distributed.all_reduce(votes, group=self._group)
        return tuple(bool(vote) for vote in votes)


class StopSignal:
    """Hears SIGTERM, SIGUSR1, SIGINT, and that the launcher has gone. Use it as a context manager around the loop.

    A second signal does what it would have done without us: the process ends at once. That the launcher has gone is
    no second one: on Ctrl-C it goes before its processes have saved.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.told = False
        """Whether this process has been told to stop."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._hear) for number in (*self.SIGNALS, LAUNCHER_GONE)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.told = True
        if number in self.SIGNALS:
            for each in self.SIGNALS:
                signal.signal(each, self._before[each])
