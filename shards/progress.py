"""Progress of a command on stderr: a bar with rate and remaining time on a terminal, lines in a log file.

rich is imported late: a command whose output goes to a file saves its 60 ms.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Protocol

LOG_INTERVAL_SECONDS = 10
"""Time between two lines of progress if stderr is no terminal."""


class Report(Protocol):
    """Callback for progress: items done, all items and, with several tasks, the title of the current one."""

    def __call__(self, done: int, total: int, title: str = ..., /) -> None:
        """Update the progress."""
        ...


def no_report(done: int, total: int, title: str = "", /) -> None:
    """Report no progress: the default of functions that take a `Report`."""


class _Rate:
    """Throughput: items per second since the current task began."""

    def __init__(self) -> None:
        self._title, self._start, self._first = "", 0.0, 0

    def update(self, done: int, title: str) -> float:
        """Give the throughput; a new title starts a new task."""
        if title != self._title:
            self._title, self._start, self._first = title, time.monotonic(), done
        return (done - self._first) / max(time.monotonic() - self._start, 1e-9)


@contextmanager
def progress(title: str, unit: str, *, shown: bool = True) -> Generator[Report]:
    """Show progress during the block: a bar with rate and remaining time, or lines in a log file.

    Yields the callback that updates it. `shown`: False shows nothing, as on all ranks but the main one.
    """
    if not shown:
        yield no_report
        return
    rate = _Rate()
    if not sys.stderr.isatty():
        last_line = time.monotonic()

        def print_line(done: int, total: int, title: str = title, /) -> None:
            nonlocal last_line
            speed = rate.update(done, title)
            if time.monotonic() - last_line >= LOG_INTERVAL_SECONDS:
                last_line = time.monotonic()
                print(f"{title}: {done} of {total} {unit}, {speed:.1f}/s", file=sys.stderr, flush=True)

        yield print_line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, rate="")

        def update_bar(done: int, total: int, title: str = title, /) -> None:
            if title != bar.tasks[0].description:
                bar.reset(task)  # or the next task would be as finished as the last one
            speed = f"{rate.update(done, title):.1f} {unit}/s"
            bar.update(task, completed=done, total=total, description=title, rate=speed)

        yield update_bar
