"""Dashboards (wandb, TensorBoard, trackio): started by name, and dropped with one line on the console when they fail.

A dashboard never fails or stops a run. Its package is imported when it is requested, and a missing one is an error
before training begins.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any, Self

from isicdist.config import TrainConfig
from isicdist.run_folder import CONFIG_NAME
from isicdist.training.tracking.client import Client, one_line
from isicdist.training.tracking.events import Details, EvaluationMetrics, Note, RunState, Sink, TrainMetrics
from shards.errors import UsageError
from shards.format import parse_json

DEFAULT_TRACKERS = TrainConfig.tracker
"""Dashboards of a run whose config names none: one of version 0.1."""


class Dashboard(Sink):
    """Names the values of each event and passes them to a dashboard, until its first failure; no method raises."""

    def __init__(self, name: str, client: Client, note: Note, *, world_size: int = 1) -> None:
        """Pass values to `client`. `name`: of the dashboard, for the line that `note` prints when it fails."""
        self._name, self._note, self._world_size = name, note, world_size
        self._client: Client | None = client

    @classmethod
    def start(cls, name: str, run: Path, config: dict[str, Any], note: Note, *, joins: bool = False) -> Self | None:
        """Start the dashboard `name` for the run of the folder `run`, or continue in it.

        `config`: of the run. `joins`: only add an evaluation to a run that the dashboard has. Returns None, with a line
        through `note`, when it fails, and without one when it is switched off (WANDB_MODE=disabled) or has no such run.
        """
        try:
            client = _start(name, run, config, note, joins=joins)
        except Exception as error:  # a dashboard never fails a run
            note(_off(name, error))
            return None
        return cls(name, client, note, world_size=int(config.get("world_size", 1))) if client else None

    def truncate_after(self, step: int, *, evaluated: bool = True) -> None:
        """Pass on the step from which training goes on."""
        with self._dropped_on_error():
            if self._client:
                self._client.truncate_after(step)

    def log_train(self, metrics: TrainMetrics) -> None:
        """Log one training step as train/loss, train/lr, ... by step, epoch and samples."""
        values = metrics.measured()
        position = {name: values.pop(name) for name in ("step", "epoch", "samples")}
        values["images_per_s_per_device"] = metrics.images_per_s / self._world_size
        with self._dropped_on_error():
            if self._client:
                self._client.log_scalars(position, _prefixed("train", values))

    def log_evaluation(self, metrics: EvaluationMetrics, details: Details | None = None) -> None:
        """Log one evaluation as SPLIT/mean_dice, SPLIT/n, ..., with the curves and pictures of `details`."""
        values = metrics.measured()
        position, split = {"step": values.pop("step")}, values.pop("split")
        with self._dropped_on_error():
            if self._client and details is None:
                self._client.log_scalars(position, _prefixed(split, values))
            elif self._client and details:
                drawn = details()
                if drawn.epoch is not None and drawn.samples is not None:
                    position |= {"epoch": drawn.epoch, "samples": drawn.samples}
                self._client.log_evaluation(position, split, _prefixed(split, {**values, **drawn.scores}), drawn)

    def close(self, state: RunState) -> None:
        """Close the dashboard."""
        with self._dropped_on_error():
            client, self._client = self._client, None
            if client:
                client.close(state)

    @contextlib.contextmanager
    def _dropped_on_error(self) -> Generator[None]:
        try:
            yield
        except Exception as error:  # a dashboard never fails a run
            self._client = None
            self._note(_off(self._name, error))


def check_installed(names: Iterable[str]) -> None:
    """Raise UsageError for a dashboard whose package is not installed, unless it is wandb and WANDB_MODE=disabled."""
    for name in names:
        off = name == "none" or (name == "wandb" and os.environ.get("WANDB_MODE") == "disabled")
        if not off and importlib.util.find_spec(name) is None:
            package = name if name == "wandb" else f"'isicdist[{name}]'"  # the others are extras
            raise UsageError(f"--tracker {name}: not installed; pip install {package}, or choose another")


def start_dashboards(run: Path, config: dict[str, Any], note: Note) -> list[Dashboard]:
    """Start the dashboards that `config["tracker"]` names; those that fail are left out, with a line each."""
    commit = _git_commit()
    shown = {**config, "git_commit": commit} if commit else config
    return [each for name in _requested(config) if (each := Dashboard.start(name, run, shown, note))]


def join_dashboards(run: Path, note: Note) -> list[Dashboard]:
    """Continue in the dashboards of a run that has ended, to add an evaluation; none for a folder without a run."""
    try:
        config = parse_json((run / CONFIG_NAME).read_bytes())
        names = _requested(config)
    except (OSError, ValueError, AttributeError):  # a model that was copied away from its run
        return []
    return [each for name in names if (each := Dashboard.start(name, run, config, note, joins=True))]


def _requested(config: dict[str, Any]) -> list[str]:
    return [name for name in config.get("tracker", DEFAULT_TRACKERS) if name != "none"]


def _start(name: str, run: Path, config: dict[str, Any], note: Note, *, joins: bool) -> Client | None:
    match name:
        case "wandb":
            from isicdist.training.tracking.wandb_log import WandbLog

            return WandbLog.start(run, config, note, joins=joins)
        case "tensorboard":
            from isicdist.training.tracking.tensorboard_log import TensorBoardLog

            return TensorBoardLog.start(run, config, note, joins=joins)
        case "trackio":
            from isicdist.training.tracking.trackio_log import TrackioLog

            return TrackioLog.start(run, config, note, joins=joins)
        case _:
            raise UsageError(f"no dashboard is called {name}")


def _prefixed(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}/{name}": value for name, value in values.items()}


def _off(name: str, error: Exception) -> str:
    return f"{name}: off for the rest of this run: {one_line(error)}"


def _git_commit() -> str | None:
    """Return the commit of this package's sources, None where they are not in a git repository."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # or it is the repository around an environment
        return git("rev-parse", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None
