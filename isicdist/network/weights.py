"""Files of weights: safetensors, their sha256, and folders that are published atomically."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Generator, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from isicdist.errors import CheckpointError
from shards.files import atomic_folder

# Names of layers in version 0.1, as regular expressions, and their names now: checkpoints of 0.1 load.
_RENAMED_LAYERS = {
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
    """Load a state dict on the CPU; layers with names of version 0.1 are renamed. Raises OSError or SafetensorError."""
    return {_current_name(name): value for name, value in load_file(path).items()}


def file_sha256(path: Path) -> str:
    """Compute the sha256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def checkpoint_folder(path: Path) -> Generator[Path]:
    """Context manager that gives a temporary folder, and atomically replaces `path` by it at the end.

    Raises CheckpointError when it cannot be written; then `path` is unchanged.
    """
    try:
        with atomic_folder(path) as folder:
            yield folder
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk raises another one in each library
        gone = isinstance(error, FileNotFoundError | PermissionError)
        advice = "did something else change that folder?" if gone else "is the disk full?"
        raise CheckpointError(f"{path}: not written ({error}); {advice} What was saved before stands") from error


def _current_name(name: str) -> str:
    for old, new in _RENAMED_LAYERS.items():
        name = re.sub(old, new, name)
    return name
