"""Checkpoints: written whole or not at all, verified when loaded, the newest valid one found.

RUN/checkpoints/step-00000065/   model.safetensors, ema.safetensors (the weights' moving average), optimizer.pt,
                                 state.json, manifest.json (sha256 of the others)

Nothing here unpickles: weights are safetensors, the optimizer loads with `weights_only=True`, the rest is JSON.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from isicdist.errors import CheckpointError
from isicdist.network.best import MODEL
from isicdist.network.weights import checkpoint_folder, file_sha256, load_weights, save_weights

EMA, OPTIMIZER, STATE, MANIFEST = "ema.safetensors", "optimizer.pt", "state.json", "manifest.json"
HASHED_FILES = (MODEL, EMA, OPTIMIZER, STATE)
"""The files whose sha256 the manifest holds."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a run goes on from."""

    path: Path
    weights: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Any]
    state: dict[str, Any]
    """step, config, best score, and the stream's state."""


def save(
    run: Path,
    step: int,
    model: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    keep: int,
) -> None:
    """Publish the checkpoint of `step` under RUN/checkpoints; then all but the `keep` newest go."""
    with checkpoint_folder(run / "checkpoints" / f"step-{step:08d}") as folder:
        save_weights(model, folder / MODEL)
        save_weights(ema, folder / EMA)
        torch.save(optimizer.state_dict(), folder / OPTIMIZER)
        (folder / STATE).write_text(json.dumps({"step": step, **state}, indent=1))
        (folder / MANIFEST).write_text(
            json.dumps({name: file_sha256(folder / name) for name in HASHED_FILES}, indent=1)
        )
    half_written = (run / "checkpoints").glob(".step-*")  # by a process that was killed
    for path in (*_steps(run)[keep:], *half_written):
        shutil.rmtree(path)


def newest(run: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest valid checkpoint, or None where there is none; `warn` is told of each damaged one before it.

    Raises CheckpointError when there are some and all are damaged: a run begun again would write over its record.
    """
    steps = _steps(run)
    for path in steps:
        try:
            return load(path)
        except CheckpointError as error:
            if path == steps[-1]:
                raise CheckpointError(f"{error}; it is the last one: begin again with another --run") from error
            warn(f"{error}; going back to the one before it")
    return None


def load(path: Path) -> Checkpoint:
    """Load one checkpoint and verify every byte. Raises CheckpointError that names the file that is wrong."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for name in HASHED_FILES:
            if file_sha256(path / name) != manifest[name]:
                raise CheckpointError(f"{path / name}: damaged (its sha256 is not the manifest's)")
        return Checkpoint(
            path=path,
            weights=load_weights(path / MODEL),
            ema=load_weights(path / EMA),
            optimizer=_load_optimizer(path / OPTIMIZER),
            state=json.loads((path / STATE).read_text()),
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a whole checkpoint ({error})") from error


def _load_optimizer(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:  # torch's own advice is to trust the file
        raise CheckpointError(f"{path}: refused, it is not made of tensors and numbers alone") from error


def _steps(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*"), reverse=True)
