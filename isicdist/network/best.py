"""RUN/best: the best model of a run, in files that hold all that a prediction and an honest score need.

RUN/best/model.safetensors       the weights
RUN/best/seen.safetensors        the images that it was trained and chosen on (`isicdist.network.seen`)
RUN/best/model.json              architecture, input size, resize mode, normalisation, threshold, score, data digest
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from torch import nn

from isicdist.config import ModelConfig
from isicdist.errors import CheckpointError, reading
from isicdist.network.normalise import MEAN, STD
from isicdist.network.seen import SeenImages
from isicdist.network.unet import SIZE_DIVISOR, ImprovedUNet
from isicdist.network.weights import checkpoint_folder, file_sha256, load_weights, save_weights
from isicdist.run_folder import BEST_FOLDER
from shards.format import MAX_SIZE, parse_json
from shards.geometry import RESIZE_MODES
from shards.reader import ShardSet

MODEL, METADATA_NAME = "model.safetensors", "model.json"
CHECKSUM = "checksum"
"""Key of the sha256 of the rest of model.json: no other file vouches for it."""


@dataclass(frozen=True, kw_only=True)
class ValidationScore:
    """Score that a model was chosen by."""

    split: str = "val"
    threshold: float = 0.5
    """Probability above which a pixel counted as lesion."""
    mean_dice: float
    """Mean Dice over the images of the split, in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class ModelMetadata:
    """The content of RUN/best/model.json: all that a prediction needs apart from the weights, and their origin."""

    architecture: ModelConfig
    size: int
    """Side of the square input in pixels, a multiple of 16."""
    fit: str
    """Resize mode that brings an image to that square: stretch, pad or crop."""
    mean: tuple[float, ...] = MEAN
    """Mean of each channel, RGB in [0, 1], subtracted from the input."""
    std: tuple[float, ...] = STD
    """Standard deviation of each channel, by which the input is divided."""
    threshold: float = 0.5
    """Probability above which a pixel is lesion: tuned on the validation split (`ThresholdCurve.tuned_threshold`)."""
    score: ValidationScore
    step: int
    """Optimizer updates before this model."""
    data_digest: str
    """Digest of the shard set that it was trained on."""
    sha256: str = ""
    """Hash of the file of weights; `save_best` sets it."""

    def __post_init__(self) -> None:
        if self.fit not in RESIZE_MODES or not 1 <= self.size <= MAX_SIZE or self.size % SIZE_DIVISOR:
            raise ValueError(f"fit {self.fit!r} to {self.size} pixels")
        if not len(self.mean) == len(self.std) == 3:
            raise ValueError(f"mean {self.mean} and std {self.std}: each needs 3 numbers")
        if not all(map(math.isfinite, self.mean)) or not all(0 < each < math.inf for each in self.std):
            raise ValueError(f"mean {self.mean} and std {self.std}: they must be finite, and std above 0")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold {self.threshold}: it must be from 0 to 1")

    @classmethod
    def of(
        cls, architecture: ModelConfig, shards: ShardSet, *, step: int, score: ValidationScore, threshold: float = 0.5
    ) -> Self:
        """Describe a model that was trained on a shard set.

        Raises ShardSetError for a set whose index does not name the resize mode, and ValueError for one whose images
        differ in size.
        """
        return cls(
            architecture=architecture,
            size=shards.size or 0,
            fit=shards.fit,
            threshold=threshold,
            score=score,
            step=step,
            data_digest=shards.digest,
        )

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Parse the content of model.json. Raises KeyError, TypeError, ValueError or UsageError for a malformed one."""
        return cls(
            architecture=ModelConfig(**value["architecture"]),
            size=int(value["size"]),
            fit=value["fit"],
            mean=tuple(map(float, value["mean"])),
            std=tuple(map(float, value["std"])),
            threshold=float(value["threshold"]),
            score=ValidationScore(**value["score"]),
            step=int(value["step"]),
            data_digest=str(value["data_digest"]),
            sha256=str(value["sha256"]),
        )

    def to_json(self) -> dict[str, Any]:
        """Give the content of model.json as plain values."""
        return dataclasses.asdict(self)


def save_best(run: Path, model: nn.Module, metadata: ModelMetadata, seen: SeenImages | None = None) -> None:
    """Publish the weights of `model`, their metadata and the images seen as RUN/best, in place of an earlier one.

    Raises CheckpointError when the files cannot be written; then the earlier ones are as they were.
    """
    with checkpoint_folder(run / BEST_FOLDER) as folder:
        save_weights(model.state_dict(), folder / MODEL)
        if seen:
            seen.save(folder)
        hashed = dataclasses.replace(metadata, sha256=file_sha256(folder / MODEL))
        content = hashed.to_json()
        (folder / METADATA_NAME).write_text(json.dumps({**content, CHECKSUM: _checksum(content)}, indent=1))


def is_model(path: Path) -> bool:
    """True for a run that has a best model, and for the folder of one."""
    return model_folder(path) is not None


def load_metadata(path: str | Path) -> ModelMetadata:
    """Read the metadata of the best model of a run. Raises CheckpointError when they are missing or damaged."""
    path = Path(path)
    folder = model_folder(path)
    if folder is None:
        what = "it has no best model yet; train it first" if path.is_dir() else "there is no such folder"
        raise CheckpointError(f"{path}: {what} (wanted: a run folder with best/, or such a folder)")
    with reading(folder / METADATA_NAME, "copy the folder again, or train the model with this version"):
        value = parse_json((folder / METADATA_NAME).read_bytes())
        checksum = value.pop(CHECKSUM, None)  # version 0.1 wrote none
        unknown = value.keys() - {field.name for field in dataclasses.fields(ModelMetadata)}
        if unknown:
            raise ValueError(f"unknown key {min(unknown)!r}")
        metadata = ModelMetadata.from_json(value)
    if checksum not in (None, _checksum(value)):
        raise CheckpointError(
            f"{folder / METADATA_NAME}: damaged, or changed by hand (its {CHECKSUM} is not that of its content); "
            f"copy it again, or remove the line {CHECKSUM} to use it as it is"
        )
    return metadata


def load_best(path: str | Path) -> tuple[ImprovedUNet, ModelMetadata]:
    """Load the network, in evaluation mode on the CPU, and its metadata from a run, its `best` folder or a copy of it.

    Raises CheckpointError when it is missing, damaged or of another network.
    """
    metadata = load_metadata(path)
    folder = model_folder(Path(path)) or Path(path)
    try:
        if file_sha256(folder / MODEL) != metadata.sha256:
            raise CheckpointError(f"{folder / MODEL}: damaged (its sha256 is not the one in {METADATA_NAME})")
        weights = load_weights(folder / MODEL)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: not a model of this isicdist ({error})") from error
    architecture = dataclasses.asdict(metadata.architecture)
    try:
        with torch.device("meta"):  # without memory: the file may describe a network of any size
            expected = {name: value.shape for name, value in ImprovedUNet(**architecture).state_dict().items()}
    except (RuntimeError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{folder}: {METADATA_NAME} describes no network ({error})") from error
    if expected != {name: value.shape for name, value in weights.items()}:
        raise CheckpointError(
            f"{folder}: the weights are of another network than {METADATA_NAME} describes; copy the whole folder again"
        )
    model = ImprovedUNet(**architecture)
    model.load_state_dict(weights)
    return model.eval(), metadata


def _checksum(content: Mapping[str, Any]) -> str:
    """Hash the content of model.json, in any order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def model_folder(path: Path) -> Path | None:
    """Find the folder with model.json: `path`, or `best` in it."""
    return next((folder for folder in (path, path / BEST_FOLDER) if (folder / METADATA_NAME).is_file()), None)
