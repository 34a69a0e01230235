"""Log to trackio: a dashboard on this machine without an account, `trackio show --project isicdist`."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import trackio  # pyright: ignore[reportMissingImports]  an extra

from isicdist.training.tracking.client import HISTOGRAM_BINS, Client, Position, Values, read_or_write_id
from isicdist.training.tracking.events import EvaluationDetails, Note, RunState

TRACKIO_ID_NAME = "trackio-id"
PROJECT = "isicdist"


class TrackioLog(Client):
    """Sends the values of one run to trackio's database."""

    def __init__(self, trackio_run: Any) -> None:
        """Log to a trackio run that has started; see `start`."""
        self._trackio_run = trackio_run

    @classmethod
    def start(cls, run: Path, config: Mapping[str, Any], note: Note, *, joins: bool = False) -> Self | None:
        """Start or resume the trackio run of the folder `run`; `joins`: only if there is one to resume."""
        if joins and not (run / TRACKIO_ID_NAME).exists():
            return None
        name = f"{run.resolve().name}-{read_or_write_id(run / TRACKIO_ID_NAME)}"
        with contextlib.redirect_stdout(io.StringIO()):  # its banner
            started = trackio.init(
                project=PROJECT, name=name, config=dict(config), resume="allow", embed=False, auto_log_cpu=False
            )
        note(f"trackio: trackio show --project {PROJECT}")
        return cls(started)

    def log_scalars(self, position: Position, values: Values) -> None:
        """Log numbers by step."""
        at = {name: value for name, value in position.items() if name != "step"}
        self._trackio_run.log({**at, **values}, step=position["step"])

    def log_evaluation(self, position: Position, split: str, scores: Values, details: EvaluationDetails) -> None:
        """Log scores, histogram of Dice, and tables of pictures with outlines."""
        drawn: dict[str, Any] = {
            f"{split}/dice_histogram": trackio.Histogram(np_histogram=np.histogram(details.dice, HISTOGRAM_BINS))
        }
        for group, examples in details.grouped().items():
            rows = [
                [each.key, each.dice, each.lesion_area, trackio.Image(each.outlined(), caption=each.caption)]
                for each in examples
            ]
            drawn[f"{split}/{group}_images"] = trackio.Table(
                columns=["key", "dice", "lesion_area", "picture"], data=rows
            )
        self.log_scalars(position, {**scores, **drawn})

    def close(self, state: RunState) -> None:
        """Write what is still in memory."""
        with contextlib.redirect_stdout(io.StringIO()):
            trackio.finish()  # of the run that was started last: a process has one
