"""Weights on the disk: safetensors with a sha256 beside them, in a folder that is published whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from isicdist.errors import CheckpointError
from shards.files import atomic_folder

# Layers whose names were others before 0.2, so that older checkpoints load.
_RENAMED = {
    r"^hand_on\.": "context_norms.",
    r"^merge\.": "localize.",
    r"^halve\.": "reduce.",
    r"^(context\.\d+)\.before\.": r"\1.norm1.",
    r"^(context\.\d+)\.between\.": r"\1.norm2.",
}


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write a state dict as safetensors."""
    save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, path)


def load_weights(path: Path) -> dict[str, Tensor]:
    """Load a state dict on the CPU, its layers by the names of today. Raises OSError or SafetensorError."""
    return {_name_of_today(name): value for name, value in load_file(path).items()}


def file_sha256(path: Path) -> str:
    """Hash a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def checkpoint_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder to fill that replaces `path` once every byte is on the disk.

    Raises CheckpointError when it cannot be written; then `path` is as it was.
    """
    try:
        with atomic_folder(path) as folder:
            yield folder
    except (OSError, RuntimeError, SafetensorError) as error:  # each library says "disk full" in a way of its own
        raise CheckpointError(
            f"{path}: not written ({error}); is the disk full? What was saved before stands"
        ) from error


def _name_of_today(name: str) -> str:
    for before, now in _RENAMED.items():
        name = re.sub(before, now, name)
    return name
