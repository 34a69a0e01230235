"""Experiment tracking: logs a run to metrics.jsonl, the console and dashboards, on the main process only.

The training loop calls one `Tracker` on every rank. On the main process it passes each event to its sinks; on the
other ranks it has none, so the loop needs no `if is_main`. metrics.jsonl is the log of record; a dashboard (wandb,
TensorBoard, trackio) that fails is dropped with one line on the console.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console

from isicdist.run_folder import CONFIG_NAME, METRICS_NAME
from isicdist.training.tracking.console_log import ConsoleLog
from isicdist.training.tracking.dashboards import (
    DEFAULT_TRACKERS,
    check_installed,
    join_dashboards,
    start_dashboards,
)
from isicdist.training.tracking.events import (
    Details,
    EvaluationDetails,
    EvaluationMetrics,
    RunState,
    Sink,
    TrainMetrics,
)
from isicdist.training.tracking.live_display import LiveDisplay
from isicdist.training.tracking.metrics_file import MetricsFile, read_metrics
from isicdist.training.tracking.wandb_log import resolve_wandb_mode
from shards.files import remove_temporary_files, write_file

__all__ = [
    "EvaluationDetails",
    "EvaluationMetrics",
    "RunState",
    "Sink",
    "Tracker",
    "TrainMetrics",
    "read_metrics",
    "resolve_wandb_mode",
]


class Tracker:
    """Passes the events of one run to its sinks, from `open` to `close`. Use it as a context manager."""

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        """Log to these sinks, in this order; they are closed in the reverse order."""
        self._sinks = list(sinks)

    @classmethod
    def open(cls, run: Path, config: dict[str, Any], *, main: bool, total_steps: int) -> Self:
        """Write RUN/config.json and open metrics.jsonl, dashboards and the console; without sinks where not `main`.

        `run`: the run's folder, made if it does not exist. `config`: the resolved config and the environment, as
        JSON; its `tracker` names the dashboards. `total_steps`: the step at which training ends.

        Raises OSError where the folder cannot be written, and on every rank UsageError for a dashboard whose package
        is not installed; any other failure of a dashboard does not raise.
        """
        check_installed(config.get("tracker", DEFAULT_TRACKERS))
        if not main:
            return cls()
        run.mkdir(parents=True, exist_ok=True)
        remove_temporary_files(run)
        write_file(run / CONFIG_NAME, json.dumps(config, indent=1).encode() + b"\n")
        metrics_file, console = MetricsFile(run), _open_console(run, total_steps)
        dashboards = start_dashboards(run, config, console.note)
        console.start()
        return cls([metrics_file, *dashboards, console])

    @classmethod
    def join(cls, run: Path) -> Self:
        """Continue in the dashboards of a run that has ended, to add an evaluation; call it on the main process only.

        Without sinks for a folder that holds no run, such as a copied model. Nothing raises.
        """
        return cls(join_dashboards(run, ConsoleLog(Console(), total_steps=0).note))

    def truncate_after(self, step: int, *, evaluated: bool = True) -> None:
        """Drop the events of steps later than `step`, from which a resumed run goes on; 0 for a new run.

        `evaluated`: False drops the evaluations of `step`, too, which the run makes up for.

        Call it at every start: it also repairs a line that a killed process did not finish. Raises TrainingError
        for a metrics.jsonl that holds something else.
        """
        for sink in self._sinks:
            sink.truncate_after(step, evaluated=evaluated)

    def log_train(self, metrics: TrainMetrics) -> None:
        """Log one training step. Raises OSError when the disk is full, ValueError after `close`."""
        for sink in self._sinks:
            sink.log_train(metrics)

    def log_evaluation(self, metrics: EvaluationMetrics, details: Details | None = None) -> None:
        """Log one evaluation of a split; `details` is called if there is a dashboard.

        Raises OSError when the disk is full, ValueError after `close`.
        """
        details = functools.cache(details) if details else None
        for sink in self._sinks:
            sink.log_evaluation(metrics, details)

    def log_progress(self, split: str, done: int, total: int) -> None:
        """Show that `done` of the `total` images of a split have been evaluated; it is not in metrics.jsonl."""
        for sink in self._sinks:
            sink.log_progress(split, done, total)

    def log_checkpoint(self, step: int) -> None:
        """Show that the checkpoint of `step` has been written; it is not in metrics.jsonl."""
        for sink in self._sinks:
            sink.log_checkpoint(step)

    def note(self, text: str) -> None:
        """Print one line on the console."""
        for sink in self._sinks:
            sink.note(text)

    def close(self, state: RunState = "finished") -> None:
        """Close all sinks; `state` is how the run ended. A second call does nothing."""
        for sink in reversed(self._sinks):
            sink.close(state)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("finished" if error is None else "failed")


def _open_console(run: Path, total_steps: int) -> ConsoleLog:
    """Choose a live display for a terminal that can draw one, lines for everything else."""
    terminal = sys.stdout.isatty()
    console = Console(force_terminal=None if terminal else False)  # not even FORCE_COLOR puts colours into a log file
    if terminal and console.is_interactive:
        return LiveDisplay(console, total_steps=total_steps, metrics_path=run / METRICS_NAME)
    return ConsoleLog(console, total_steps=total_steps)
