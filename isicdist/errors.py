"""Errors of training and prediction, the upper part of the tree that `shards.errors` draws."""

from __future__ import annotations

from shards.errors import ToolkitError


class CheckpointError(ToolkitError):
    """A checkpoint that is missing, damaged or of another network."""


class TrainingError(ToolkitError):
    """A run that cannot go on: the message says at which step and why."""


class StoppedError(ToolkitError):
    """A run that a signal stopped: its checkpoint is saved, and it waits to be started again."""

    exit_code = 85
