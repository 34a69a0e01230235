"""metrics.jsonl: the log of a run, one JSON object per line."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isicdist.errors import CheckpointError, TrainingError
from isicdist.run_folder import METRICS_NAME
from isicdist.training.tracking.events import Details, EvaluationMetrics, RunState, Sink, TrainMetrics
from shards.files import name_in_errors, write_file
from shards.format import parse_json


class MetricsFile(Sink):
    """Appends each event to RUN/metrics.jsonl; it is in the file when the call returns."""

    def __init__(self, run: Path) -> None:
        """Open the file of the run's folder for appending. Raises OSError where it cannot be written."""
        self._path = run / METRICS_NAME
        self._file = self._path.open("ab", buffering=0)

    def truncate_after(self, step: int, *, evaluated: bool = True) -> None:
        """Drop the events of later steps, and a last line that a killed process did not finish.

        `evaluated`: False drops the evaluations of `step`, too.

        The new file replaces the old by a rename: a kill leaves one or the other. Raises TrainingError for a line
        that is not an event.
        """
        lines = self._path.read_bytes().splitlines(keepends=True)
        last = {TrainMetrics.event: step, EvaluationMetrics.event: step if evaluated else step - 1}
        remaining = [line for line in lines if line.endswith(b"\n") and not self._is_after(line, last)]
        if len(remaining) < len(lines):
            write_file(self._path, b"".join(remaining))
            self._file.close()  # its descriptor belongs to the file that was replaced
            self._file = self._path.open("ab", buffering=0)

    def log_train(self, metrics: TrainMetrics) -> None:
        """Append one event. Raises OSError when the disk is full, ValueError when the file is closed."""
        self._append(metrics.to_json())

    def log_evaluation(self, metrics: EvaluationMetrics, details: Details | None = None) -> None:
        """Append one event. Raises OSError when the disk is full, ValueError when the file is closed."""
        self._append(metrics.to_json())

    def close(self, state: RunState) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, event: dict[str, Any]) -> None:
        """Write one line with one system call, so that a reader never sees half of it."""
        data = json.dumps(event, allow_nan=False).encode() + b"\n"
        with name_in_errors(self._path):
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _is_after(self, line: bytes, last: Mapping[str, int]) -> bool:
        """True for an event later than the last step of its kind."""
        try:
            event = parse_json(line)
            return event["step"] > last[event["event"]]
        except (ValueError, KeyError, TypeError):
            raise TrainingError(
                f"{self._path}: not an event: {line[:60]!r}; repair that line or move the file away"
            ) from None


def read_metrics(path: Path) -> tuple[list[TrainMetrics], list[EvaluationMetrics]]:
    """Read metrics.jsonl, without a last line that a killed process did not finish.

    Raises CheckpointError for a line that is not an event, OSError for a file that cannot be read.
    """
    train: list[TrainMetrics] = []
    evaluations: list[EvaluationMetrics] = []
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            continue
        try:
            event = parse_json(line)
            if event["event"] == TrainMetrics.event:
                train.append(TrainMetrics.from_json(event))
            elif event["event"] == EvaluationMetrics.event:
                evaluations.append(EvaluationMetrics.from_json(event))
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(f"{path}: damaged, not an event: {line[:60]!r}") from None
    return train, evaluations
