"""Collect the files of a run: config.json, metrics.jsonl, RUN/best/model.json and the evaluations, typed."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from isicdist.config import Fold, flat_settings, precision_name
from isicdist.errors import CheckpointError, reading
from isicdist.metrics.examples import EXAMPLES_FOLDER, EXAMPLES_NAME, Example, read_examples
from isicdist.metrics.pooled import PooledScores, read_pooled
from isicdist.metrics.results import PER_IMAGE_NAME, THRESHOLDS_NAME
from isicdist.metrics.summary import SUMMARY_NAME, EvaluationSummary
from isicdist.network.best import ModelMetadata, is_model, load_metadata
from isicdist.run_folder import CONFIG_NAME, EVALUATION_FOLDER, METRICS_NAME
from isicdist.training.tracking import EvaluationMetrics, TrainMetrics, read_metrics
from shards.format import Counts, parse_json

RECORDED = {"data_digest", "world_size", "mixed_precision", "batch.global_size", "model.base_channels", "model.dropout"}
"""Settings in config.json that a report cannot do without."""
EVALUATE = "evaluate the split again"
"""Advice for a damaged file of an evaluation."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The shard set that a run was trained on, as its config.json records it."""

    splits: Mapping[str, int]
    """Samples in each split."""
    counts: Counts
    """Input files found, packed and rejected, and pairs of duplicates."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Parse the key `dataset` of config.json. Raises KeyError, TypeError or ValueError for a malformed one."""
        splits = {str(name): int(samples) for name, samples in value["splits"].items()}
        return cls(splits=splits, counts=Counts.from_json(value["counts"]))


@dataclass(frozen=True, kw_only=True, eq=False)
class PerImageScores:
    """The columns of per_image.csv that the report uses, each in the order of the split."""

    keys: tuple[str, ...]
    """Key of each image (its ISIC id)."""
    groups: tuple[str, ...]
    """Group of each image; in tables of older versions its key."""
    original_sizes: np.ndarray
    """(height, width) of each original in pixels, float64 (n, 2)."""
    lesion_areas: np.ndarray
    """Share of each image that is lesion, float64 (n,)."""
    tuned_dice: np.ndarray
    """Dice at the tuned threshold and the finest resolution, float64 (n,)."""
    network_dice: np.ndarray
    """Dice at 0.5 and the network's resolution, float64 (n,)."""
    original_dice: np.ndarray | None
    """Dice at 0.5 and the original resolution, float64 (n,); None for a split without original masks."""
    network_lesions: np.ndarray
    """Lesion pixels of each mask at the network's resolution, float64 (n,)."""
    original_lesions: np.ndarray | None
    """The same at the original resolution."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read per_image.csv. Raises KeyError, TypeError or ValueError for a malformed file, OSError for none."""
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        # Version 0.1 called the tuned threshold the model's own.
        tuned = "tuned_threshold" if "tuned_threshold_dice" in rows[0] else "own_threshold"
        has_original = "original_dice" in rows[0]

        def column(name: str) -> np.ndarray:
            return np.array([float(row[name]) for row in rows])

        return cls(
            keys=tuple(row["id"] for row in rows),
            groups=tuple(row.get("group", row["id"]) for row in rows),
            original_sizes=np.stack([column("original_height"), column("original_width")], axis=1),
            lesion_areas=column("lesion_area"),
            tuned_dice=column(f"{tuned}_original_dice" if has_original else f"{tuned}_dice"),
            network_dice=column("dice"),
            original_dice=column("original_dice") if has_original else None,
            network_lesions=column("tp") + column("fn"),
            original_lesions=column("original_tp") + column("original_fn") if has_original else None,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """The files of one evaluation. All but the summary are read when they are first used."""

    folder: Path
    """RUN/evaluation/<split>."""
    summary: EvaluationSummary

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read summary.json. Raises CheckpointError for a damaged one or one of an older version."""
        path = folder / SUMMARY_NAME
        with reading(path, EVALUATE):
            return cls(folder=folder, summary=EvaluationSummary.from_json(parse_json(path.read_bytes())))

    @cached_property
    def thresholds(self) -> Mapping[str, np.ndarray]:
        """The columns of thresholds.csv by name, float64 (256,) each. Raises CheckpointError for a damaged file."""
        path = self.folder / THRESHOLDS_NAME
        with reading(path, EVALUATE):
            with path.open(newline="") as file:
                rows = list(csv.DictReader(file))
            return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}

    @cached_property
    def per_image(self) -> PerImageScores:
        """The scores of each image. Raises CheckpointError for a missing or damaged per_image.csv."""
        path = self.folder / PER_IMAGE_NAME
        with reading(path, EVALUATE):
            return PerImageScores.read(path)

    @cached_property
    def examples(self) -> list[Example]:
        """The worst, median and best images; none in an evaluation of version 0.1. Raises CheckpointError."""
        folder = self.folder / EXAMPLES_FOLDER
        if not folder.exists():
            return []
        with reading(folder / EXAMPLES_NAME, EVALUATE):
            return read_examples(folder)


@dataclass(frozen=True, kw_only=True, eq=False)
class RunFiles:
    """A run as its files describe it."""

    name: str
    """Name of its folder; the path where several runs have that name."""
    folder: Path
    config: Mapping[str, Any]
    """config.json: the resolved config, nested by section, and what the run was started on."""
    train: Sequence[TrainMetrics]
    """Logged training steps, at least one."""
    validations: Sequence[EvaluationMetrics]
    """Evaluations on the validation split, in training."""
    evaluations: Mapping[str, Evaluation]
    """Evaluations of the best model by `isicdist evaluate`, by split."""

    @classmethod
    def read(cls, folder: Path, *, name: str) -> Self:
        """Read a run. Raises CheckpointError for a folder that is none, has no step yet, or holds a damaged file."""
        if not (folder / METRICS_NAME).is_file():
            raise CheckpointError(f"{folder}: not a run (no {METRICS_NAME}); give the folder that train --run wrote")
        train, validations = read_metrics(folder / METRICS_NAME)
        if not train:
            raise CheckpointError(f"{folder}: nothing is logged in it yet; wait for its first steps")
        with reading(folder / CONFIG_NAME, "copy the run again"):
            config = parse_json((folder / CONFIG_NAME).read_bytes())
            if missing := RECORDED - flat_settings(config).keys():
                raise KeyError(min(missing))
        return cls(
            name=name,
            folder=folder,
            config=config,
            train=train,
            validations=validations,
            evaluations=_read_evaluations(folder),
        )

    @classmethod
    def read_all(cls, folders: Sequence[Path]) -> list[Self]:
        """Read several runs, each under a name of its own. Raises what `read` raises."""
        names = [folder.resolve().name for folder in folders]
        return [
            cls.read(folder, name=name if names.count(name) == 1 else str(folder))
            for folder, name in zip(folders, names, strict=True)
        ]

    @property
    def best(self) -> EvaluationMetrics | None:
        """The validation of the best model, by mean Dice; None before the first."""
        return max(self.validations, key=lambda scores: scores.mean_dice, default=None)

    @property
    def validation_split(self) -> str:
        """Name of the images that the run was validated on: val, or those of its fold."""
        return Fold.parse(self.config["fold"]).name if self.config.get("fold") else "val"

    @property
    def outdated(self) -> list[EvaluationSummary]:
        """The evaluations of a model that is no longer the best one."""
        summaries = [evaluation.summary for evaluation in self.evaluations.values()]
        return [each for each in summaries if self._is_outdated(each)]

    def _is_outdated(self, summary: EvaluationSummary) -> bool:
        # Older versions recorded no hash of the model.
        another = self.model is not None and bool(summary.models) and summary.models != (self.model.sha256,)
        return another or (self.best is not None and summary.model_step != self.best.step)

    @property
    def precision(self) -> str:
        """float32, bf16 or fp16."""
        return precision_name(self.config["mixed_precision"])

    @cached_property
    def model(self) -> ModelMetadata | None:
        """Metadata of the best model; None before the first. Raises CheckpointError for a malformed file."""
        return load_metadata(self.folder) if is_model(self.folder) else None

    @cached_property
    def dataset(self) -> Dataset | None:
        """The shard set; None where config.json does not record it. Raises CheckpointError for a malformed record."""
        if "dataset" not in self.config:
            return None
        with reading(self.folder / CONFIG_NAME, "copy the run again"):
            return Dataset.from_json(self.config["dataset"])


@dataclass(frozen=True, kw_only=True, eq=False)
class CrossValidation:
    """A finished cross-validation: its pooled scores, the runs of its folds, and the scores of the ensemble."""

    name: str
    """Name of the folder."""
    scores: Mapping[str, PooledScores]
    """Scores of all held-out images together by setting: threshold and resolution."""
    folds: Sequence[RunFiles]
    ensemble: Mapping[str, Evaluation]
    """Evaluations of the mean of its models by split; none before isicdist evaluate --ensemble."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a cross-validation. Raises CheckpointError for a damaged file, and what `RunFiles.read` raises."""
        scores = read_pooled(folder)
        count = len(next(iter(scores.values())).of_folds)
        runs = [folder / fold.run_name for fold in Fold(number=1, count=count).all]
        return cls(
            name=folder.resolve().name,
            scores=scores,
            folds=RunFiles.read_all(runs),
            ensemble=_read_evaluations(folder),
        )


def _read_evaluations(folder: Path) -> dict[str, Evaluation]:
    """Read the evaluations of a run or of an ensemble, by split."""
    found = [Evaluation.read(path.parent) for path in sorted((folder / EVALUATION_FOLDER).glob(f"*/{SUMMARY_NAME}"))]
    return {evaluation.summary.split: evaluation for evaluation in found}
