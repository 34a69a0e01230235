"""Agreement between ranks: stop together on a signal, repeat a step together, and notice a rank that is lost."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import re
import signal
import threading
from collections.abc import Generator
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, Self, cast

import torch
from accelerate import Accelerator

from isicdist.distributed.launch import LAUNCHER_GONE
from isicdist.distributed.lost_ranks import lost_ranks
from isicdist.errors import TrainingError


@contextlib.contextmanager
def raise_on_lost_rank() -> Generator[None]:
    """Re-raise a collective that failed or timed out as TrainingError. Decorates a command."""
    try:
        yield
    except RuntimeError as error:
        # [.../gloo/.../pair.cc:553] Connection closed by peer
        cause = re.search(r"gloo/\S*\] (.*?)(\. |$)", str(error), re.M)
        if not cause and not isinstance(error, torch.distributed.DistError):
            raise
        lost = lost_ranks()
        raise TrainingError(
            f"another rank {f'({lost}) ' if lost else ''}has gone or does not answer ({cause[1] if cause else error}); "
            "its own line or the launcher's report says which one and why; then start the same command again"
        ) from error


class AnyRank:
    """Logical OR of flags over all ranks: a gloo all-reduce between the hosts, which does not wait for a GPU.

    A rank that has died is noticed here, whatever its device was doing.
    """

    def __init__(self, accelerator: Accelerator, timeout: float) -> None:
        """Make the process group; every rank does. `timeout`: seconds to wait for the other ranks."""
        several = accelerator.num_processes > 1
        limit = timedelta(seconds=timeout)
        group = torch.distributed.new_group(backend="gloo", timeout=limit) if several else None
        self._group = cast("torch.distributed.ProcessGroup | None", group)  # an int for ranks that it leaves out
        if self._group is not None:
            _open_groups.add(self._group)

    def __call__(self, *flags: bool) -> tuple[bool, ...]:
        """Give, for each of the `flags`, True when it is True on any rank. Every rank calls it."""
        if self._group is None:
            return flags
        votes = torch.tensor(flags, dtype=torch.int32)
        torch.distributed.all_reduce(votes, group=self._group)
        return tuple(bool(vote) for vote in votes)

    def close(self) -> None:
        """End the threads of the group, where `end_training` has not done so; no rank is waited for."""
        group, self._group = self._group, None
        if group in _open_groups:
            _end(group)


_open_groups: set[torch.distributed.ProcessGroup] = set()
"""The groups of votes; torch would hold them, too, when the vote is long gone by an error."""


@atexit.register
def _end_groups() -> None:
    """End gloo's threads, which may abort a process that ends by an error, where NCCL's group is left as it is."""
    for group in list(_open_groups):
        _end(group)


def _end(group: torch.distributed.ProcessGroup) -> None:
    _open_groups.discard(group)
    if torch.distributed.is_initialized():
        with contextlib.suppress(ValueError):  # it belonged to a group of all that was ended before
            torch.distributed.destroy_process_group(group)


class StopSignal:
    """Receives SIGTERM, SIGUSR1 and SIGINT, and the death of the launcher. Use it as a context around the loop.

    Signals of the next REPEAT_SECONDS count as the same one: a scheduler signals every process of a job, and the
    launcher passes its own signal on. A later one ends the process at once, also while it waits for a device. The death
    of the launcher does not count as a second one: on Ctrl-C it ends before its processes have saved.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    REPEAT_SECONDS = 5.0

    def __init__(self) -> None:
        self.received = False
        """This process has been asked to stop."""
        self._previous: dict[int, Any] = {}
        self._signalled, self._first, self._closed = False, threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._restore_default, name="second signal", daemon=True)

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._handle) for number in (*self.SIGNALS, LAUNCHER_GONE)}
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._signalled = True  # from here on `_handle` leaves the event alone: it may interrupt the next line
        self._closed.set()
        self._first.set()
        self._thread.join()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if number in self.SIGNALS and not self._signalled:
            self._signalled = True
            self._first.set()

    def _restore_default(self) -> None:
        """Have the kernel end the process on a second signal, once the first one is REPEAT_SECONDS old.

        On a thread and by libc: a handler in Python waits for the main thread, which may be inside of a collective.
        """
        self._first.wait()
        if not self._closed.wait(self.REPEAT_SECONDS):
            for number in self.SIGNALS:
                ctypes.CDLL(None).signal(number, ctypes.c_void_p(signal.SIG_DFL))
