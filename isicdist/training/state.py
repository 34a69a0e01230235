"""What a run goes on from: one checkpoint for all ranks, and a config that may go on from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn

from isicdist.errors import CheckpointError
from isicdist.training import checkpoint
from isicdist.training.checkpoint import Checkpoint
from shards.errors import ToolkitError, UsageError
from shards.files import recover_folder

if TYPE_CHECKING:
    from accelerate import Accelerator

FIXED = ("data_digest", "seed", "model")
"""What must stay as it was when a run goes on: keys of the record, or sections of it."""


def find(run: Path, record: dict[str, Any], accelerator: Accelerator) -> Checkpoint | None:
    """The newest valid checkpoint of `run`, the same on every rank; None where there is none.

    `record`: the config as it is now, which the checkpoint holds as it was. The main process chooses, and prints
    what is damaged and what has changed. Every rank raises what it raises: UsageError for a change in what is FIXED or
    for `resume = "never"`, CheckpointError when all are damaged.
    """
    found, answer = None, None
    if accelerator.is_main_process:
        try:
            found = _choose(run, record)
            answer = found.path if found else None
        except ToolkitError as error:
            answer = error
    answer = broadcast_object_list([answer])[0]
    if isinstance(answer, ToolkitError):
        raise answer
    return found if found or answer is None else checkpoint.load(answer)


def _choose(run: Path, record: dict[str, Any]) -> Checkpoint | None:
    recover_folder(run / "best")
    found = checkpoint.newest(run, lambda damaged: print(f"warning: {damaged}"))
    if found:
        if record["resume"] == "never":
            raise UsageError(f"{run}: has checkpoints already; choose another --run, or --resume auto to go on")
        for line in changes(found.state["config"], record, run):
            print(f"changed since {found.path.name}: {line}")
    return found


def changes(before: dict[str, Any], after: dict[str, Any], run: Path) -> list[str]:
    """One line for each setting that differs. Raises UsageError for one of FIXED."""
    old, new = (dict(_flat(json.loads(json.dumps(record)))) for record in (before, after))
    lines = []
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) == new.get(name):
            continue
        if name in FIXED or name.partition(".")[0] in FIXED:
            raise UsageError(
                f"{run}: trained with {name} {old.get(name)}, and cannot go on with {new.get(name)}; "
                "choose another --run, or the value as it was"
            )
        lines.append(f"{name} {old.get(name)} -> {new.get(name)}")
    return lines


def restore(found: Checkpoint, model: nn.Module, ema: nn.Module, adam: torch.optim.Adam) -> None:
    """Put back weights, their average and the optimizer's moments; its settings stay those of the config.

    Raises CheckpointError when they are of another network.
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


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
