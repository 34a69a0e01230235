"""Log to Weights & Biases: scalars, curves, pictures with masks as overlays, and on request the best model.

Online if the user is logged in and the server answers, else offline in RUN/wandb for `wandb sync`. WANDB_PROJECT,
WANDB_NAME, WANDB_ENTITY, WANDB_TAGS, ... are respected.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from isicdist.run_folder import BEST_FOLDER
from isicdist.training.tracking.client import Client, Position, Values, one_line, read_or_write_id
from isicdist.training.tracking.events import EvaluationDetails, Note, RunState

if TYPE_CHECKING:
    import wandb

WANDB_ID_NAME = "wandb-id"
PROJECT = "isicdist"

_INIT_TIMEOUT = 20.0  # seconds, for a cluster node that is logged in but has no route to the internet
_FINISH_TIMEOUT = 60.0  # seconds; what is not uploaded by then stays in RUN/wandb for `wandb sync`
_AXES = ("step", "epoch", "samples")
_LEAST = ("loss", "calibration_error", "data_wait")  # of these values the summary is the minimum, ...
_GREATEST = ("dice", "jaccard", "precision", "images_per_s", "images_per_s_per_device", "memory_bytes", "grad_norm")


class WandbLog(Client):
    """Sends the values of one run to wandb."""

    def __init__(self, wandb_run: wandb.Run, best: Path | None = None) -> None:
        """Log to a wandb run that has started; see `start`. `best`: folder of the model to log as an artifact."""
        self._wandb_run, self._best = wandb_run, best
        self._defined: set[str] = set()
        for axis in _AXES:
            wandb_run.define_metric(axis)

    @classmethod
    def start(cls, run: Path, config: Mapping[str, Any], note: Note, *, joins: bool = False) -> Self | None:
        """Start or resume the wandb run of the folder `run`, online if the user is logged in, else offline.

        `config`: shown at wandb. `joins`: only if there is a run to resume. Returns None when there is not, or when
        WANDB_MODE is "disabled". Raises wandb.Error when wandb cannot even log offline.
        """
        if joins and not (run / WANDB_ID_NAME).exists():
            return None
        mode, reason = resolve_wandb_mode()
        if mode == "disabled":
            return None
        import wandb

        try:
            started = _init(run, config, mode)
        except wandb.Error as error:  # logged in, but with a wrong key or without a network: log to files instead
            if mode != "online":
                raise
            wandb.teardown()  # its service process still holds the run that did not start
            mode, reason = "offline", f"online failed: {one_line(error)}"
            started = _init(run, config, mode)
        note(f"wandb: {started.url}" if mode == "online" else f"wandb: {mode} ({reason}); in {run / 'wandb'}")
        return cls(started, run / BEST_FOLDER if config.get("log_model") == "best" and not joins else None)

    def log_scalars(self, position: Position, values: Values) -> None:
        """Log numbers by step, epoch and samples."""
        self._define(values)
        self._wandb_run.log({**position, **values})

    def log_evaluation(self, position: Position, split: str, scores: Values, details: EvaluationDetails) -> None:
        """Log one evaluation with its threshold curve, histogram of Dice, table of the worst images and pictures."""
        from isicdist.training.tracking.wandb_media import media

        self.log_scalars(position, {**scores, **{f"{split}/{name}": each for name, each in media(details).items()}})

    def close(self, state: RunState) -> None:
        """Finish the run at wandb, marked as crashed if it failed; else log RUN/best as an artifact before."""
        try:
            if self._best and self._best.is_dir() and state != "failed":
                self._log_model(self._best)
        finally:
            self._wandb_run.finish(exit_code=1 if state == "failed" else 0)

    def _define(self, values: Values) -> None:
        """Name the axis and the summary of values that are logged for the first time."""
        # A step axis of our own: wandb's refuses the steps that a resumed run trains again.
        for name in values.keys() - self._defined:
            summary = "min,last" if name.endswith(_LEAST) else "max,last" if name.endswith(_GREATEST) else "last"
            self._wandb_run.define_metric(name, step_metric="step", summary=summary)
        self._defined |= values.keys()

    def _log_model(self, best: Path) -> None:
        import wandb

        from isicdist.network.best import METADATA_NAME

        metadata = json.loads((best / METADATA_NAME).read_bytes())
        artifact = wandb.Artifact(f"best-{self._wandb_run.id}", type="model", metadata=metadata)
        for file in sorted(best.iterdir()):  # `add_dir` prints
            artifact.add_file(str(file))
        self._wandb_run.log_artifact(artifact, aliases=["best", f"step-{metadata['step']}"])


def resolve_wandb_mode() -> tuple[str, str]:
    """Choose wandb's mode from WANDB_MODE and the login, without a prompt on the terminal or a network request.

    Returns (mode, reason). The mode is "online" only with credentials, which wandb looks for in WANDB_API_KEY, its
    settings and the netrc file.
    """
    mode = os.environ.get("WANDB_MODE")
    if mode == "":
        del os.environ["WANDB_MODE"]  # which wandb refuses; in a shell, an empty variable is none
    elif mode and mode != "online":
        return mode, "WANDB_MODE"
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    try:
        logged_in = wandb.login(prompt=False, verify=False)
    except (ValueError, wandb.Error) as error:  # a key that cannot be one
        return "offline", one_line(error)
    if logged_in:
        return "online", "logged in"
    return "offline", "not logged in: `wandb login` changes that"


def _init(run: Path, config: Mapping[str, Any], mode: str) -> wandb.Run:
    import wandb

    # Arguments win over the environment: only what it does not name is given. What wandb records of the source (git
    # remote, patch, notebook) is left out: a remote's address may hold a password.
    settings = wandb.Settings(
        silent=True,
        console="off",
        init_timeout=_INIT_TIMEOUT,
        finish_timeout=_FINISH_TIMEOUT,
        disable_git=True,
        disable_job_creation=True,
        save_code=False,
    )
    # The files of tables and artifacts wait there for `wandb sync`; by default in the user's home folder.
    os.environ.setdefault("WANDB_DATA_DIR", str(run.resolve() / "wandb"))
    return wandb.init(
        project=os.environ.get("WANDB_PROJECT") or PROJECT,
        id=read_or_write_id(run / WANDB_ID_NAME, os.environ.get("WANDB_RUN_ID", "")),  # set by a sweep's agent
        name=os.environ.get("WANDB_NAME") or run.resolve().name,
        dir=run,
        config=dict(config),
        mode=mode,  # pyright: ignore[reportArgumentType]
        resume="allow",
        settings=settings,
    )
