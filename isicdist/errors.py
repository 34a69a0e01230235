"""Errors of training and prediction, the upper part of the tree that `shards.errors` draws."""

from __future__ import annotations

import csv
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from shards.errors import ToolkitError


class CheckpointError(ToolkitError):
    """A checkpoint that is missing, damaged or of another network."""


class TrainingError(ToolkitError):
    """A run that cannot go on: the message says at which step and why."""


class StoppedError(ToolkitError):
    """A run that a signal stopped: its checkpoint is saved, and it waits to be started again."""

    exit_code = 85


@contextmanager
def reading(path: Path, advice: str) -> Generator[None]:
    """Raise whatever a block raises for a missing or malformed file as CheckpointError, which names the file."""
    try:
        yield
    except (OSError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, csv.Error) as error:
        raise CheckpointError(f"{path}: missing or damaged; {advice} ({_in_short(error)})") from error


def _in_short(error: Exception) -> str:
    """Describe an error in a few words: a KeyError is just the key."""
    if isinstance(error, KeyError):
        return f"no {error}"
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
