"""Resume: the state that a run continues from, found, checked and restored the same on every rank."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from accelerate.utils import broadcast_object_list
from torch import nn

from isicdist import __version__
from isicdist.config import TrainConfig, flat_settings
from isicdist.data.stream import StreamState
from isicdist.distributed.environment import recorded
from isicdist.distributed.launch import computes_tf32
from isicdist.errors import CheckpointError, StoppedError
from isicdist.run_folder import BEST_FOLDER, LOCK_NAME, REQUEUE_NAME
from isicdist.training import checkpoint
from isicdist.training.checkpoint import Checkpoint
from isicdist.training.optim import EarlyStopping
from shards.errors import ToolkitError, UsageError
from shards.files import FolderLock, recover_folder

if TYPE_CHECKING:
    from accelerate import Accelerator

FIXED_SETTINGS = ("data_digest", "seed", "fold", "model")
"""Keys of the run record, or sections of it, that must stay as they were when a run is resumed."""
"""File in the run's folder while a run that a signal stopped waits to be started again."""
MAY_DIFFER = ("tf32", "device", "environment")
"""Keys of the run record, or sections of it, that need not be the same on every rank."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """RUN/config.json: the resolved config, and what the run was started on."""

    config: TrainConfig
    data_digest: str
    """Digest of the shard set."""
    world_size: int
    """Processes."""
    mixed_precision: str
    """no, bf16 or fp16."""
    tf32: bool
    """Convolutions in float32 are computed in TF32 (GPUs from Ampere on)."""
    device: str
    """Name of the GPU, or cpu."""
    environment: Mapping[str, str]
    """Environment variables that may change the numbers or the speed."""
    versions: Mapping[str, str]
    """Versions of Python and of the packages that decide the numbers."""

    @classmethod
    def of(cls, config: TrainConfig, data_digest: str, accelerator: Accelerator) -> Self:
        """Record this process's environment."""
        names = ("torch", "accelerate", "webdataset")
        return cls(
            config=config,
            data_digest=data_digest,
            world_size=accelerator.num_processes,
            mixed_precision=accelerator.mixed_precision,
            tf32=computes_tf32(accelerator.device),
            device=torch.cuda.get_device_name(accelerator.device) if accelerator.device.type == "cuda" else "cpu",
            environment=recorded(os.environ),
            versions={
                "python": platform.python_version(),
                "isicdist": __version__,  # sources that are not installed have no metadata
                **{name: importlib.metadata.version(name) for name in names},
            },
        )

    def to_json(self) -> dict[str, Any]:
        """Give plain values: the sections of the config beside the other fields."""
        rest = {each.name: getattr(self, each.name) for each in dataclasses.fields(self) if each.name != "config"}
        return {**self.config.to_json(), **rest}

    def common_settings(self) -> dict[str, Any]:
        """Give each value that must be the same on every rank, by its dotted name."""
        return flat_settings({name: value for name, value in self.to_json().items() if name not in MAY_DIFFER})


@dataclass(kw_only=True)
class TrainState:
    """Everything a run continues from, apart from weights and the optimizer's moments.

    What `to_json` saves is what `from_json` restores; a new field belongs in both.
    """

    stream: StreamState
    """Epoch and samples consumed."""
    step: int = 0
    """Optimizer updates so far."""
    early_stopping: EarlyStopping
    """Best validation score, and evaluations since."""
    eval_pending: bool = False
    """A signal interrupted the evaluation after `step`: the resumed run makes up for it first."""
    scaler: dict[str, Any] | None = None
    """State of the gradient scaler (fp16); None without one."""
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    """The run record as it was when this state was saved."""

    def to_json(self) -> dict[str, Any]:
        """Give plain values for state.json."""
        return {
            "step": self.step,
            "best": self.early_stopping.best,
            "evals_since_best": self.early_stopping.evals_since_best,
            "eval_pending": self.eval_pending,
            "stream": self.stream,
            "scaler": self.scaler,
            "config": self.config,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], *, patience: int) -> Self:
        """Restore what `to_json` gave; the keys of version 0.1 are read, too. Raises KeyError for a missing one."""
        since, pending = (
            value[new] if new in value else value[old]
            for new, old in (("evals_since_best", "since_best"), ("eval_pending", "unjudged"))
        )
        return cls(
            step=value["step"],
            early_stopping=EarlyStopping(patience=patience, best=value["best"], evals_since_best=since),
            eval_pending=pending,
            stream=value["stream"],
            scaler=value["scaler"],
            config=value["config"],
        )


class RunLock(FolderLock):
    """Lock of a run's folder (the file RUN/.lock), so that no two jobs train in it at once."""

    def __init__(self, run: Path) -> None:
        """Prepare the lock of the folder `run`."""
        in_use = f"{run}: another process trains in it; wait for its end or give another --run"
        super().__init__(run / LOCK_NAME, in_use)


def find_checkpoint(run: Path, record: RunRecord, accelerator: Accelerator, lock: RunLock) -> Checkpoint | None:
    """Lock `run` and load its newest valid checkpoint, the same on every rank; None where there is none.

    The main process reads it and broadcasts it, so that only its machine must have the folder; it prints which
    checkpoints are damaged and which settings have changed since. Every rank raises the same error: UsageError for a
    change of one of FIXED_SETTINGS, for `resume = "never"` or a folder that is in use, CheckpointError when all
    checkpoints are damaged, StoppedError where a launcher restarts what a signal has stopped, OSError for a folder that
    cannot be read.
    """
    answer: Checkpoint | Exception | None = None
    if accelerator.is_main_process:
        try:
            lock.acquire()
            answer = _choose(run, record)
        except (ToolkitError, OSError) as error:
            answer = error
    answer = broadcast_object_list([answer])[0]
    if isinstance(answer, Exception):
        raise answer
    return answer


def _choose(run: Path, record: RunRecord) -> Checkpoint | None:
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0 and (run / REQUEUE_NAME).exists():
        raise StoppedError(f"{run}: stopped by a signal in this launch, which --max_restarts does not undo")
    recover_folder(run / BEST_FOLDER)
    found = checkpoint.newest(run, lambda damaged: print(f"warning: {damaged}"))
    if found:
        if record.config.resume == "never":
            raise UsageError(f"{run}: has checkpoints already; choose another --run, or --resume auto to go on")
        for line in changed_settings(found.state["config"], record.to_json(), run):
            print(f"changed since {found.path.name}: {line}")
    return found


def changed_settings(before: dict[str, Any], after: dict[str, Any], run: Path) -> list[str]:
    """Describe each setting that differs between two run records, a line each.

    Raises UsageError for one of FIXED_SETTINGS.
    """
    # Of the settings that an older version did not have, the defaults.
    old, new, defaults = (
        flat_settings(json.loads(json.dumps(record))) for record in (before, after, TrainConfig().to_json())
    )
    old = {name: value for name, value in defaults.items() if name in new} | old
    lines: list[str] = []
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) == new.get(name):
            continue
        if name in FIXED_SETTINGS or name.partition(".")[0] in FIXED_SETTINGS:
            raise UsageError(
                f"{run}: trained with {name} {old.get(name)}, and cannot go on with {new.get(name)}; "
                "choose another --run, or the value as it was"
            )
        lines.append(f"{name} {old.get(name)} -> {new.get(name)}")
    return lines


def restore_weights(found: Checkpoint, model: nn.Module, ema: nn.Module, adam: torch.optim.Adam) -> None:
    """Load weights, their EMA and the optimizer's moments; the optimizer's settings stay those of the config.

    Each moment gets the memory layout of its weight, as fused Adam reads both by one index; a file has the default one.

    Raises CheckpointError when they belong to another network.
    """
    settings = [{name: value for name, value in group.items() if name != "params"} for group in adam.param_groups]
    try:
        model.load_state_dict(found.weights)
        ema.load_state_dict(found.ema)
        adam.load_state_dict(found.optimizer)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{found.path}: of another network; train in a new run folder") from error
    for group, wanted in zip(adam.param_groups, settings, strict=True):
        group.update(wanted)
    for weight, moments in adam.state.items():
        for name, moment in moments.items():
            if moment.shape == weight.shape:
                moments[name] = torch.empty_like(weight).copy_(moment)
