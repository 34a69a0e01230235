"""Log to Weights & Biases. Whatever fails in wandb is printed in one line, and training goes on without it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from isicdist.training.tracking.events import EvaluationMetrics, RunState, Sink, TrainMetrics
from shards.files import write_file

if TYPE_CHECKING:
    import wandb

WANDB_ID_NAME = "wandb-id"

_INIT_TIMEOUT = 20.0  # seconds, for a cluster node that is logged in but has no route to the internet
_FINISH_TIMEOUT = 60.0  # seconds; what is not uploaded by then stays in RUN/wandb for `wandb sync`

Note = Callable[[str], None]
"""Prints one line on the console."""


class WandbLog(Sink):
    """Sends the events of a run to wandb until the first failure; no method raises."""

    def __init__(self, run: wandb.Run, note: Note) -> None:
        """Log to a wandb run that has started; see `start`."""
        self._run: wandb.Run | None = run
        self._note = note

    @classmethod
    def start(cls, run: Path, config: dict[str, Any], note: Note) -> Self | None:
        """Start or resume the wandb run of the folder `run`, online if the user is logged in, else offline.

        Returns None, with a line through `note`, when wandb fails, and without one when WANDB_MODE is "disabled".
        """
        mode, reason = "", ""
        try:
            mode, reason = resolve_wandb_mode()
            if mode == "disabled":
                return None
            import wandb

            try:
                started = _init(run, config, mode)
            except wandb.Error as error:  # logged in, but without a network: log to files instead
                if mode != "online":
                    raise
                wandb.teardown()  # its service process still holds the run that did not start
                mode, reason = "offline", f"online failed: {_one_line(error)}"
                started = _init(run, config, mode)
            note(f"wandb: {started.url}" if mode == "online" else f"wandb: {mode} ({reason}); in {run / 'wandb'}")
            return cls(started, note)
        except Exception as error:  # a dashboard never fails a run
            note(_off(error))
            return None

    def log_train(self, metrics: TrainMetrics) -> None:
        """Log one training step as train/loss, train/lr, ..."""
        values = dataclasses.asdict(metrics)
        self._log({"step": values.pop("step"), **{f"train/{name}": value for name, value in values.items()}})

    def log_evaluation(self, metrics: EvaluationMetrics) -> None:
        """Log one evaluation as SPLIT/mean_dice, SPLIT/n, ..."""
        values = dataclasses.asdict(metrics)
        step, split = values.pop("step"), values.pop("split")
        self._log({"step": step, **{f"{split}/{name}": value for name, value in values.items()}})

    def close(self, state: RunState) -> None:
        """Finish the run at wandb, marked as crashed if it failed."""
        with self._drop_on_error():
            if self._run is not None:
                self._run.finish(exit_code=1 if state == "failed" else 0)
        self._run = None

    def _log(self, values: dict[str, Any]) -> None:
        with self._drop_on_error():
            if self._run is not None:
                self._run.log(values)

    @contextlib.contextmanager
    def _drop_on_error(self) -> Generator[None]:
        try:
            yield
        except Exception as error:  # a dashboard never fails a run
            self._run = None
            self._note(_off(error))


def resolve_wandb_mode() -> tuple[str, str]:
    """Choose wandb's mode from WANDB_MODE and the login, without a prompt on the terminal or a network request.

    Returns (mode, reason). The mode is "online" only with credentials, which wandb looks for in WANDB_API_KEY, its
    settings and the netrc file.
    """
    mode = os.environ.get("WANDB_MODE")
    if mode and mode != "online":
        return mode, "WANDB_MODE"
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    if wandb.login(prompt=False, verify=False):
        return "online", "logged in"
    return "offline", "not logged in: `wandb login` changes that"


def _init(run: Path, config: dict[str, Any], mode: str) -> wandb.Run:
    import wandb

    started = wandb.init(
        project="isicdist",
        id=_run_id(run),
        name=run.resolve().name,
        dir=run,
        config=config,
        mode=mode,  # pyright: ignore[reportArgumentType]
        resume="allow",
        settings=wandb.Settings(silent=True, console="off", init_timeout=_INIT_TIMEOUT, finish_timeout=_FINISH_TIMEOUT),
    )
    # A step axis of our own: wandb's refuses the steps that a resumed run trains again.
    started.define_metric("step")
    started.define_metric("*", step_metric="step")
    return started


def _run_id(run: Path) -> str:
    """Read the id of the run at wandb, drawn at its first start, so that a resumed run continues its curves."""
    path = run / WANDB_ID_NAME
    if not path.exists():
        write_file(path, f"{secrets.token_hex(4)}\n".encode())
    return path.read_text().strip()


def _off(error: Exception) -> str:
    return f"wandb: off for the rest of this run: {_one_line(error)}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
