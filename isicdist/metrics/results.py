"""Results of an evaluation: the files summary.json, per_image.csv and thresholds.csv."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from isicdist.config import Tta
from isicdist.metrics.dice import DiceSummary, per_image_scores
from isicdist.metrics.summary import (
    SUMMARY_NAME,
    AreaScores,
    EnsembleSummary,
    EvaluationSummary,
    ExclusionSummary,
    Relation,
    ResolutionScores,
    SubgroupScores,
    SubgroupSummary,
    ThresholdSummary,
)
from isicdist.metrics.thresholds import ThresholdCurve
from shards.errors import UsageError
from shards.exclusions import read_excluded
from shards.files import write_file
from shards.reader import Split
from shards.tables import csv_bytes, read_column_of

PER_IMAGE_NAME, THRESHOLDS_NAME = "per_image.csv", "thresholds.csv"
LESION_AREA_PARTS = 4


@dataclass(frozen=True, kw_only=True)
class Subgroups:
    """One column of a metadata table, by which images are scored in subgroups."""

    column: str
    """Name of the column."""
    values: Mapping[str, str]
    """Its value by image key; images that the table does not name have the value ""."""

    @classmethod
    def read(cls, spec: str, split: Split) -> Self:
        """Read FILE.csv:COLUMN. Raises UsageError when it is not there, or names no image of the split."""
        column, values = read_column_of(spec, "--metadata", "sex")
        if not any(split.key(index) in values for index in range(len(split))):
            raise UsageError(f"--metadata {spec}: it names none of the images; is it another set's table?")
        return cls(column=column, values=values)


@dataclass(frozen=True, kw_only=True)
class Exclusions:
    """The images that a table excludes: scores are given with and without them."""

    table: str
    """Name of the table's file."""
    sha256: str
    """Hash of that file."""
    keys: frozenset[str]

    @classmethod
    def read(cls, path: Path, split: Split) -> Self:
        """Read a table of `shards.exclusions`. Raises UsageError where it is none, or excludes all of the split."""
        keys = read_excluded(path)
        if keys.issuperset(split.key(index) for index in range(len(split))):
            raise UsageError(f"--exclude {path}: it excludes all images of {split.name}; none would be scored")
        return cls(table=path.name, sha256=hashlib.sha256(path.read_bytes()).hexdigest(), keys=keys)


@dataclass(frozen=True, kw_only=True)
class ThresholdScores:
    """The counts of one model on one split at one threshold."""

    threshold: float
    """Threshold of the probability: above it a pixel is lesion."""
    network: DiceSummary
    """At the size the network sees."""
    original: DiceSummary | None
    """At each image's own size; None where the split does not carry the original masks."""

    @property
    def finest(self) -> DiceSummary:
        """At the original size where there is one, else at the network's."""
        return self.original or self.network

    def of_images(self, images: np.ndarray) -> Self:
        """Select the counts of some images, (n,) bool in the order of the rows."""
        original = DiceSummary.of(self.original.rows[images]) if self.original else None
        return dataclasses.replace(self, network=DiceSummary.of(self.network.rows[images]), original=original)

    def summary(self, digest: str, groups: Sequence[str]) -> ThresholdSummary:
        """Add the confidence intervals; `digest` is the shard set's, `groups` has the group of each image."""
        return ThresholdSummary(
            threshold=self.threshold,
            network=ResolutionScores.of(self.network, digest, groups),
            original=ResolutionScores.of(self.original, digest, groups) if self.original else None,
        )


@dataclass(frozen=True, kw_only=True)
class Results:
    """All counts of one model on one split, from which the files of an evaluation are made."""

    split: Split
    groups: Sequence[str]
    """Group of each image of the split, by index; images of one are resampled together."""
    step: int
    """Step of the training run that the model is of."""
    tta: Tta
    """Test-time augmentation that the probabilities are averaged over."""
    relation: Relation
    """How the model relates to the images."""
    precision: str
    """Precision of the network: float32, bf16 or fp16."""
    models: tuple[str, ...]
    """sha256 of the weights of each model."""
    at_default: ThresholdScores
    """At 0.5, the threshold that models are compared at."""
    at_tuned: ThresholdScores
    """At the model's own threshold, tuned on the validation split: that of the masks that a prediction draws."""
    curve: ThresholdCurve
    """At every threshold, pixels pooled, at the size the network sees."""
    subgroups: Subgroups | None = None
    members: Mapping[str, DiceSummary] = field(default_factory=dict[str, DiceSummary])
    """Of an ensemble: the counts of each of its models alone at 0.5 and the network's resolution, by name."""
    exclusions: Exclusions | None = None

    @cached_property
    def original_sizes(self) -> np.ndarray:
        """(height, width) of each original in pixels, int64 (n, 2), in the order of the rows."""
        table = self.split.table[self.at_tuned.network.rows[:, 0]]
        return np.stack([table["height"], table["width"]], axis=1).astype(np.int64)

    @cached_property
    def lesion_areas(self) -> np.ndarray:
        """Share of each image that is lesion, 0 to 1, float64 (n,): of the original where its mask is there."""
        lesion = self.at_tuned.finest.rows[:, [1, 3]].sum(axis=1)  # TP + FN
        if self.at_tuned.original:
            return lesion / self.original_sizes.prod(axis=1)
        assert self.split.size is not None
        return lesion / self.split.size**2

    @cached_property
    def summary(self) -> EvaluationSummary:
        """The scores of summary.json; the bootstrap of the confidence intervals takes seconds."""
        digest, groups = self.split.digest, self._groups_of(self.at_default.network)
        return EvaluationSummary(
            split=self.split.name,
            data_digest=digest,
            resolution=self.split.size,
            model_step=self.step,
            tta=self.tta,
            relation=self.relation,
            precision=self.precision,
            models=self.models,
            at_default=self.at_default.summary(digest, groups),
            at_tuned=self.at_tuned.summary(digest, groups),
            thresholds=self.curve.summary(),
            lesion_area_quartiles=tuple(self._by_lesion_area()),
            subgroups=self._by_value(self.subgroups) if self.subgroups else None,
            ensemble=self._gain(groups) if self.members else None,
            without_excluded=self._without(self.exclusions) if self.exclusions else None,
        )

    def write(self, out: Path) -> None:
        """Write summary.json, per_image.csv and thresholds.csv into the folder `out`."""
        out.mkdir(parents=True, exist_ok=True)
        _write_csv(out / PER_IMAGE_NAME, self._per_image())
        _write_csv(out / THRESHOLDS_NAME, self.curve.table())
        write_file(out / SUMMARY_NAME, json.dumps(self.summary.to_json(), indent=1).encode() + b"\n")

    def _gain(self, groups: Sequence[str]) -> EnsembleSummary:
        """Compare the ensemble with each of its models."""
        return EnsembleSummary.of(self.at_default.network, self.members, self.split.digest, groups)

    def _groups_of(self, summary: DiceSummary) -> list[str]:
        """Give the group of each row."""
        indices: list[int] = summary.rows[:, 0].tolist()
        return [self.groups[index] for index in indices]

    def _without(self, exclusions: Exclusions) -> ExclusionSummary:
        """Score the images that are not excluded."""
        keys = [self.split.key(index) for index in self.at_tuned.network.rows[:, 0].tolist()]
        remaining = np.array([key not in exclusions.keys for key in keys])
        at_default, at_tuned = self.at_default.of_images(remaining), self.at_tuned.of_images(remaining)
        groups = self._groups_of(at_default.network)
        return ExclusionSummary(
            table=exclusions.table,
            sha256=exclusions.sha256,
            keys=tuple(key for key in keys if key in exclusions.keys),
            at_default=at_default.summary(self.split.digest, groups),
            at_tuned=at_tuned.summary(self.split.digest, groups),
        )

    def _by_lesion_area(self) -> Iterable[AreaScores]:
        """Score the images in four parts of (nearly) the same number, from the smallest lesions to the largest."""
        rows = self.at_tuned.finest.rows
        for part in np.array_split(np.argsort(self.lesion_areas, kind="stable"), LESION_AREA_PARTS):
            if len(part):
                areas, scores = self.lesion_areas[part], DiceSummary.of(rows[part])
                ends = {"least_area": float(areas[0]), "largest_area": float(areas[-1])}
                yield AreaScores.of(scores, self.split.digest, self._groups_of(scores), **ends)

    def _by_value(self, subgroups: Subgroups) -> SubgroupSummary:
        """Score the images of each value of the subgroup column."""
        rows = self.at_tuned.finest.rows
        values = np.array([subgroups.values.get(self.split.key(index), "") for index in rows[:, 0].tolist()])
        parts = {str(value): DiceSummary.of(rows[values == value]) for value in np.unique(values)}
        groups = [
            SubgroupScores.of(part, self.split.digest, self._groups_of(part), value=value)
            for value, part in parts.items()
        ]
        return SubgroupSummary(column=subgroups.column, groups=tuple(groups))

    def _per_image(self) -> list[dict[str, Any]]:
        """Return the rows of per_image.csv, in the order of the split."""
        columns = {
            "id": [self.split.key(index) for index in self.at_tuned.network.rows[:, 0].tolist()],
            "group": self._groups_of(self.at_tuned.network),
            "original_height": self.original_sizes[:, 0].tolist(),
            "original_width": self.original_sizes[:, 1].tolist(),
            "lesion_area": self.lesion_areas.tolist(),
        }
        for scores, prefix in ((self.at_default, ""), (self.at_tuned, "tuned_threshold_")):
            columns |= _columns(scores.network, prefix)
            if scores.original:
                columns |= _columns(scores.original, f"{prefix}original_")
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _columns(summary: DiceSummary, prefix: str) -> dict[str, list[Any]]:
    tp, fp, fn = summary.rows[:, 1:].T
    dice, jaccard = per_image_scores(summary.rows)
    columns = {"tp": tp, "fp": fp, "fn": fn, "dice": dice, "jaccard": jaccard}
    return {f"{prefix}{name}": values.tolist() for name, values in columns.items()}


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    write_file(path, csv_bytes(rows[0], [list(row.values()) for row in rows]))
