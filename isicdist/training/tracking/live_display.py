"""Live display of a run on a terminal: progress and ETA, curves of loss and Dice, throughput, evaluation progress.

A thread redraws it twice a second from numbers that the training loop has left behind, so that a step costs nothing.
Lines printed meanwhile by this process (notes, warnings, logging) appear above it.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TextIO, cast

from rich.console import Console, ConsoleOptions, RenderResult
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from isicdist.training.tracking.console_log import ConsoleLog
from isicdist.training.tracking.events import Details, EvaluationMetrics, RunState, TrainMetrics
from isicdist.training.tracking.metrics_file import read_metrics
from isicdist.training.tracking.sparkline import ASCII_RAMP, BLOCKS, Curve

REFRESH_PER_SECOND = 2  # the thread shares the GIL with the training loop
ETA_LOGS = 50  # logged steps whose mean duration, evaluations included, predicts the remaining time


class LiveDisplay(ConsoleLog):
    """Shows training steps and evaluations in progress; prints notes and scores as lines above."""

    def __init__(self, console: Console, *, total_steps: int, metrics_path: Path) -> None:
        """Draw on `console`; a resumed run shows the curves of `metrics_path`, its metrics.jsonl, from the start."""
        super().__init__(console, total_steps=total_steps)
        self._metrics_path = metrics_path
        self._opened = ExitStack()
        self._started = time.monotonic()
        self._reset(0)

    def start(self) -> None:
        """Show the display."""
        self._started = time.monotonic()
        live = Live(
            get_renderable=lambda: self,
            console=self.console,
            refresh_per_second=REFRESH_PER_SECOND,
            redirect_stderr=sys.stderr.isatty(),  # else it goes to a file, and belongs there
            vertical_overflow="crop",
        )
        self._opened.enter_context(live)
        self.console.show_cursor(True)  # it stays visible whatever kills the process
        self._opened.enter_context(_logging_to_live_stderr())
        self._opened.callback(self._end)

    def truncate_after(self, step: int, *, evaluated: bool = True) -> None:
        """Show the run as metrics.jsonl has it up to `step`."""
        self._reset(step)
        if step:
            train, evaluations = read_metrics(self._metrics_path)
            for metrics in train:
                self._add_train(metrics)
            for scores in evaluations:
                self._add_evaluation(scores)

    def log_train(self, metrics: TrainMetrics) -> None:
        """Show the metrics."""
        self._add_train(metrics)
        self._logged.append((time.monotonic(), metrics.step))
        self.note_skipped(metrics)

    def log_progress(self, split: str, done: int, total: int) -> None:
        """Show the progress of an evaluation."""
        self._evaluating = (split, done, total)

    def log_evaluation(self, metrics: EvaluationMetrics, details: Details | None = None) -> None:
        """Print the scores in one line, and show them."""
        self._evaluating = None
        self._add_evaluation(metrics)
        super().log_evaluation(metrics)

    def log_checkpoint(self, step: int) -> None:
        """Show the newest checkpoint."""
        self._checkpoint = step

    def close(self, state: RunState) -> None:
        """Draw the display for the last time and release the terminal; lines can still be printed."""
        self._opened.close()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        levels = ASCII_RAMP if options.ascii_only else BLOCKS
        columns = Column(no_wrap=True, overflow="crop"), Column(ratio=1), Column(no_wrap=True, overflow="crop")
        grid = Table.grid(*columns, expand=True, padding=(0, 2, 0, 0))
        step = self._train.step if self._train else self._resumed_at
        epoch = f"  epoch {self._train.epoch}" if self._train else ""
        position = f"step {step}/{self.total_steps}{epoch}  {self._time_left()}"
        grid.add_row("train", ProgressBar(total=max(1, self.total_steps), completed=step), position)
        if self._train:
            grid.add_row("loss", _Sparkline(self._loss, levels, "magenta"), f"{self._train.loss:.4f}")
            grid.add_row("train dice", _Sparkline(self._dice, levels, "green"), f"{self._train.pooled_dice:.4f}")
        if self._best:
            best = f"{self._scores.last:.4f}  best {self._best.mean_dice:.4f} at step {self._best.step}"
            grid.add_row(f"{self._best.split} dice", _Sparkline(self._scores, levels, "cyan"), best)
        if evaluating := self._evaluating:
            split, done, total = evaluating
            grid.add_row(f"evaluate {split}", ProgressBar(total=total, completed=done), f"{done}/{total} images")
        yield grid
        yield Text(self._resources(), no_wrap=True, overflow="crop", style="dim")
        if not self._ended:
            # The cursor rests on an empty line: what another rank prints begins there.
            yield Text()

    def _reset(self, step: int) -> None:
        self._resumed_at = step
        self._train: TrainMetrics | None = None
        self._loss, self._dice, self._scores = Curve(), Curve(), Curve()
        self._best: EvaluationMetrics | None = None
        self._evaluating: tuple[str, int, int] | None = None
        self._checkpoint: int | None = step or None
        self._logged = deque[tuple[float, int]](maxlen=ETA_LOGS)
        self._ended = False

    def _add_train(self, metrics: TrainMetrics) -> None:
        self._loss.add(metrics.loss)
        self._dice.add(metrics.pooled_dice)
        self._train = metrics

    def _add_evaluation(self, metrics: EvaluationMetrics) -> None:
        self._scores.add(metrics.mean_dice)
        if self._best is None or metrics.mean_dice > self._best.mean_dice:
            self._best = metrics

    def _time_left(self) -> str:
        """Format the predicted remaining time, or the time since the start while there is no prediction."""
        now = time.monotonic()
        if len(self._logged) < 2 or self._ended or self._logged[-1][1] >= self.total_steps:
            return f"{_clock(now - self._started)} elapsed"
        (start, first), (end, last) = self._logged[0], self._logged[-1]
        seconds = (self.total_steps - last) * (end - start) / (last - first) - (now - end)
        return f"{_clock(max(0, seconds))} left"

    def _resources(self) -> str:
        parts: list[str] = []
        if self._train:
            parts += [f"{self._train.images_per_s:.1f} images/s", f"data wait {self._train.data_wait:.0%}"]
            if self._train.memory_bytes:
                parts.append(f"memory {self._train.memory_bytes / 1e9:.1f} GB")
        if self._checkpoint is not None:
            parts.append(f"checkpoint at step {self._checkpoint}")
        return "   ".join(parts)

    def _end(self) -> None:
        self._ended = True


class _Sparkline:
    """Curve as wide as its column."""

    def __init__(self, curve: Curve, levels: str, style: str) -> None:
        self._curve, self._levels, self._style = curve, levels, style

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self._curve.sparkline(options.max_width, self._levels), self._style, no_wrap=True, end="")


@contextmanager
def _logging_to_live_stderr() -> Generator[None]:
    """Redirect the handlers of `logging` that print to stderr, such as those of torch, to rich's proxy of it."""
    proxy = sys.stderr
    if not isinstance(proxy, FileProxy):
        yield
        return
    terminal = cast("TextIO", proxy.rich_proxied_file)
    handlers = [
        handler
        for logger in (logging.root, *logging.root.manager.loggerDict.values())
        for handler in getattr(logger, "handlers", ())
        if isinstance(handler, logging.StreamHandler) and handler.stream is terminal
    ]
    for handler in handlers:
        handler.setStream(proxy)
    try:
        yield
    finally:
        for handler in handlers:
            handler.setStream(terminal)


def _clock(seconds: float) -> str:
    """Format a duration as h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
