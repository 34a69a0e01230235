"""Checkpoints: written whole or not at all, verified when loaded, the newest valid one found.

RUN/checkpoints/step-00000065/   model.safetensors, ema.safetensors (the weights' moving average), optimizer.pt,
                                 state.json, manifest.json (sha256 of the others)
RUN/best/                        model.safetensors, model.json: all that a prediction needs, and nothing else

Nothing here unpickles: weights are safetensors, the optimizer loads with `weights_only=True`, the rest is JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from isicdist.model import ImprovedUNet
from shards.errors import CheckpointError

MODEL, EMA, OPTIMIZER, STATE, MANIFEST, CARD = (
    "model.safetensors",
    "ema.safetensors",
    "optimizer.pt",
    "state.json",
    "manifest.json",
    "model.json",
)
VOUCHED = (MODEL, EMA, OPTIMIZER, STATE)
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
    with _published(run / "checkpoints" / f"step-{step:08d}") as folder:
        save_file(_weights(model), folder / MODEL)
        save_file(_weights(ema), folder / EMA)
        torch.save(optimizer.state_dict(), folder / OPTIMIZER)
        (folder / STATE).write_text(json.dumps({"step": step, **state}, indent=1))
        (folder / MANIFEST).write_text(json.dumps({name: _sha256(folder / name) for name in VOUCHED}, indent=1))
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
        for name in VOUCHED:
            if _sha256(path / name) != manifest[name]:
                raise CheckpointError(f"{path / name}: damaged (its sha256 is not the manifest's)")
        return Checkpoint(
            path=path,
            weights=load_file(path / MODEL),
            ema=load_file(path / EMA),
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


def save_best(run: Path, model: nn.Module, card: dict[str, Any]) -> None:
    """Publish RUN/best: the weights and `card`, which says everything that using them needs (see `load_model`)."""
    with _published(run / "best") as folder:
        save_file(_weights(model), folder / MODEL)
        (folder / CARD).write_text(json.dumps({**card, "sha256": _sha256(folder / MODEL)}, indent=1))


def load_model(path: str | Path) -> tuple[ImprovedUNet, dict[str, Any]]:
    """The network in evaluation mode, and its card, from a run, its `best` folder, or a copy of that.

    The card holds architecture, size, fit, mean, std, threshold, score and data digest.
    Raises CheckpointError when it is missing, damaged or of another network.
    """
    path = Path(path)
    folder = path if (path / CARD).is_file() else path / "best"
    if not (folder / CARD).is_file():
        what = "it has no best model yet; train it first" if path.is_dir() else "there is no such folder"
        raise CheckpointError(f"{path}: {what} (wanted: a run folder with best/, or such a folder)")
    try:
        card = json.loads((folder / CARD).read_text())
        if _sha256(folder / MODEL) != card["sha256"]:
            raise CheckpointError(f"{folder / MODEL}: damaged (its sha256 is not the one in {CARD})")
        model = ImprovedUNet(**card["architecture"])
        weights = load_file(folder / MODEL)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: not a model of this isicdist ({error})") from error
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # its message has a line for every weight
        raise CheckpointError(
            f"{folder}: the weights are of another network than {CARD} describes; copy the whole folder again"
        ) from error
    return model.eval(), card


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}


def _steps(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*"), reverse=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def put_back_best(run: Path) -> None:
    """Undo the first of the two renames that replace RUN/best, where a kill came between them."""
    target, old = run / "best", _beside(run / "best", "old")
    if old.exists() and not target.exists():
        old.rename(target)


def _beside(target: Path, state: str) -> Path:
    return target.with_name(f".{target.name}.{state}")


@contextlib.contextmanager
def _published(target: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `target` by a rename once every byte is on the disk.

    Raises CheckpointError when it cannot be written; what `target` was before, it still is.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    new, old = _beside(target, "new"), _beside(target, "old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        for path in (*new.iterdir(), new):
            _fsync(path)
    except (OSError, RuntimeError, SafetensorError) as error:  # each library says "disk full" in a way of its own
        shutil.rmtree(new, ignore_errors=True)
        raise CheckpointError(
            f"{target}: not written ({error}); is the disk full? What was saved before stands"
        ) from error
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():  # a folder cannot be renamed over a full one
        target.rename(old)
    new.rename(target)
    _fsync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
