"""Checkpoints: written whole or not at all, verified when loaded, the newest valid one found.

RUN/checkpoints/step-00000065/   model.safetensors, ema.safetensors (the weights' moving average), optimizer.pt,
                                 state.json, manifest.json (sha256 of the others)

Nothing here unpickles: weights are safetensors, the optimizer loads with `weights_only=True`, the rest is JSON.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from isicdist.errors import CheckpointError
from isicdist.network.best import MODEL
from isicdist.network.weights import checkpoint_folder, file_sha256, load_weights, save_weights
from isicdist.run_folder import CHECKPOINTS_FOLDER
from shards.format import parse_json

EMA, OPTIMIZER, STATE, MANIFEST = "ema.safetensors", "optimizer.pt", "state.json", "manifest.json"
HASHED_FILES = (MODEL, EMA, OPTIMIZER, STATE)
"""The files whose sha256 the manifest holds."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The content of one checkpoint, on the CPU."""

    path: Path
    weights: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Any]
    state: dict[str, Any]
    """step, config, best score, and the stream's state: see `isicdist.training.state.TrainState`."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Copies of weights, EMA and optimizer as they are at one step, which training no longer changes."""

    weights: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Any]

    @classmethod
    def of(cls, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> Self:
        """Copy to the CPU's memory: 51 MB for the network of the paper."""
        weights, averages, moments = (_copied(each.state_dict()) for each in (model, ema, optimizer))
        return cls(weights=weights, ema=averages, optimizer=moments)


def save(run: Path, snapshot: Snapshot, state: dict[str, Any], *, keep: int) -> None:
    """Publish a checkpoint under RUN/checkpoints, then delete those before it, but for the `keep` - 1 newest of them.

    Later ones stay, which are damaged or the run would not be here. `state` has the step, and what else
    `TrainState.to_json` gives. Raises CheckpointError when it cannot be written.
    """
    path = run / CHECKPOINTS_FOLDER / f"step-{state['step']:08d}"
    with checkpoint_folder(path) as folder:
        save_weights(snapshot.weights, folder / MODEL)
        save_weights(snapshot.ema, folder / EMA)
        torch.save(snapshot.optimizer, folder / OPTIMIZER)
        (folder / STATE).write_text(json.dumps(state, indent=1))
        (folder / MANIFEST).write_text(
            json.dumps({name: file_sha256(folder / name) for name in HASHED_FILES}, indent=1)
        )
    steps = _steps(run)
    half_written = (run / CHECKPOINTS_FOLDER).glob(".step-*")  # by a process that was killed
    for old in (*steps[steps.index(path) + keep :], *half_written):
        shutil.rmtree(old)


class BackgroundWriter:
    """Writes checkpoints on a thread while training goes on, one after the other. Use it as a context manager."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def submit(self, write: Callable[..., None], *arguments: Any, **options: Any) -> None:
        """Have `write` called on the thread, once the write before it has ended. Raises what that one has raised."""
        self.wait()
        self._pending = self._pool.submit(write, *arguments, **options)

    def wait(self) -> None:
        """Wait until all is written. Raises what the last write has raised."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            self._pool.shutdown(wait=True)  # what has begun is finished even after an error


def newest(run: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """Load the newest valid checkpoint, or None where there is none; `warn` gets a line for each damaged one.

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
        manifest = parse_json((path / MANIFEST).read_bytes())
        for name in HASHED_FILES:
            if file_sha256(path / name) != manifest[name]:
                raise CheckpointError(f"{path / name}: damaged (its sha256 is not the manifest's)")
        return Checkpoint(
            path=path,
            weights=load_weights(path / MODEL),
            ema=load_weights(path / EMA),
            optimizer=_load_optimizer(path / OPTIMIZER),
            state=parse_json((path / STATE).read_bytes()),
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a whole checkpoint ({error})") from error


def _copied(value: Any) -> Any:
    """Copy all tensors of a nested state dict to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, Mapping):
        return {name: _copied(each) for name, each in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, list):
        return [_copied(each) for each in cast(list[Any], value)]
    return value


def _load_optimizer(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:  # torch's own advice is to trust the file
        raise CheckpointError(f"{path}: refused, it is not made of tensors and numbers alone") from error


def _steps(run: Path) -> list[Path]:
    return sorted((run / CHECKPOINTS_FOLDER).glob("step-*"), reverse=True)
