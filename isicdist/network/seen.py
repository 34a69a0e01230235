"""RUN/best/seen.safetensors: the images that a model was trained and chosen on, by hashes of their keys.

A score is of unseen images only where it is known which ones the model has seen; the digest of the shard set does not
tell, as the same images may be in another set, and in another split of it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from isicdist.errors import CheckpointError
from shards.reader import Split

SEEN_NAME = "seen.safetensors"


@dataclass(frozen=True, kw_only=True, eq=False)
class SeenImages:
    """The images that a model has seen, as sorted 64-bit hashes of their keys."""

    trained: np.ndarray
    """Of the images that it was trained on, int64 (n,)."""
    validated: np.ndarray
    """Of the images by whose scores it and its threshold were chosen, int64 (n,)."""

    @classmethod
    def of(cls, trained: Split, validated: Split) -> Self:
        """Hash the keys of the two splits of a run."""
        return cls(trained=np.sort(_hashes(trained)), validated=np.sort(_hashes(validated)))

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """Read the file in RUN/best; None where there is none, as before version 0.2. Raises CheckpointError."""
        path = folder / SEEN_NAME
        if not path.is_file():
            return None
        try:
            return cls(**load_file(path))
        except (OSError, SafetensorError, TypeError) as error:
            raise CheckpointError(f"{path}: damaged ({error}); copy the folder again") from error

    def save(self, folder: Path) -> None:
        """Write the file into a folder. Raises OSError or SafetensorError."""
        save_file({"trained": self.trained, "validated": self.validated}, folder / SEEN_NAME)

    def trained_in(self, split: Split) -> np.ndarray:
        """Select the images of a split that the model was trained on, by their keys, bool (n,)."""
        return np.isin(_hashes(split), self.trained)

    def validated_in(self, split: Split) -> np.ndarray:
        """Select the images of a split that the model was chosen by, by their keys, bool (n,)."""
        return np.isin(_hashes(split), self.validated)


def _hashes(split: Split) -> np.ndarray:
    """Hash the key of each sample: the first 8 bytes of its sha256, int64 (n,)."""
    digests = b"".join(hashlib.sha256(key).digest()[:8] for key in split.table["key"].tolist())
    return np.frombuffer(digests, "<i8").astype(np.int64)
