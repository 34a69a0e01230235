"""Interface to one dashboard: named values by position in the run, and evaluations with their pictures.

The modules `wandb_log`, `tensorboard_log` and `trackio_log` implement it. Their methods may raise: `Dashboard` catches.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from isicdist.training.tracking.events import EvaluationDetails, RunState
from shards.files import write_file

HISTOGRAM_BINS = np.linspace(0, 1, 21)
"""Edges of the bins of the histogram of the Dice of each image."""
CURVE_STRIDE = 4
"""Every fourth of the 256 thresholds is drawn."""

Position = Mapping[str, int]
"""Position of values in the run: `step`, and where they are known `epoch` and `samples`."""
Values = Mapping[str, Any]
"""Numbers by name, such as train/loss."""


class Client(Protocol):
    """Sends the values of one run to one dashboard."""

    def truncate_after(self, step: int) -> None:
        """Forget the values of steps later than `step`, from which training goes on."""

    def log_scalars(self, position: Position, values: Values) -> None:
        """Log numbers."""

    def log_evaluation(self, position: Position, split: str, scores: Values, details: EvaluationDetails) -> None:
        """Log the scores of one evaluation of `split`, its curves and its pictures."""

    def close(self, state: RunState) -> None:
        """Send the values that are still in memory, and end the run with `state`."""


def read_or_write_id(path: Path, default: str = "") -> str:
    """Read the id of a run at a dashboard, so that a resumed run continues its curves.

    It is written at the first start: `default`, or eight random hexadecimal digits.
    """
    if not path.exists():
        write_file(path, f"{default or secrets.token_hex(4)}\n".encode())
    return path.read_text().strip()


def one_line(error: Exception) -> str:
    """Return the message of an error in one line."""
    return " ".join(str(error).split()) or type(error).__name__
