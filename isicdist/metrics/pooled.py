"""Pooled scores of a cross-validation: every held-out image once, each scored by the model that has not seen it.

RUNS/crossval.json          the scores, by threshold and resolution
RUNS/per_image.csv          those of every image, with its fold
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from isicdist.config import Fold
from isicdist.errors import reading
from isicdist.metrics.dice import SCORE_NAMES, DiceSummary
from isicdist.metrics.results import PER_IMAGE_NAME
from isicdist.metrics.summary import ResolutionScores
from isicdist.run_folder import EVALUATION_FOLDER
from shards.files import write_file
from shards.format import parse_json
from shards.tables import csv_bytes

POOLED_NAME = "crossval.json"
SETTINGS = {
    "threshold 0.5, network resolution": "",
    "threshold 0.5, original resolution": "original_",
    "own threshold, network resolution": "tuned_threshold_",
    "own threshold, original resolution": "tuned_threshold_original_",
}
"""Prefixes of the columns tp, fp and fn of per_image.csv, by what they were counted at."""


@dataclass(frozen=True, kw_only=True)
class PooledScores:
    """Scores of all held-out images together, and their spread over the folds."""

    pooled: ResolutionScores
    """Scores of all images, each predicted by the model that has not seen it, with confidence intervals."""
    of_folds: tuple[dict[str, float], ...]
    """Scores of each fold by name."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read what `dataclasses.asdict` made. Raises KeyError, TypeError or ValueError for anything else."""
        folds = tuple({name: float(fold[name]) for name in SCORE_NAMES} for fold in value["of_folds"])
        return cls(pooled=ResolutionScores.from_json(value["pooled"]), of_folds=folds)

    def mean(self, name: str) -> float:
        """Mean of a score over the folds."""
        return math.fsum(scores[name] for scores in self.of_folds) / len(self.of_folds)

    def deviation(self, name: str) -> float:
        """Standard deviation of a score over the folds."""
        return statistics.stdev(scores[name] for scores in self.of_folds)


def per_image_of(runs: Path, fold: Fold) -> Path:
    """Locate the table of the held-out images of a fold."""
    return runs / fold.run_name / EVALUATION_FOLDER / fold.name / PER_IMAGE_NAME


def pool_scores(runs: Path, folds: Sequence[Fold], digest: str) -> dict[str, PooledScores]:
    """Pool the counts of all held-out images by setting, and write both files.

    `digest`: of the shard set, which seeds the bootstrap. Raises CheckpointError for a table that is damaged.
    """
    rows: list[dict[str, str]] = []
    counts_of: dict[str, list[np.ndarray]] = {}
    for fold in folds:
        with reading(per_image_of(runs, fold), "remove it to score that fold again"):
            table = _read_table(per_image_of(runs, fold))
            rows += [{"fold": str(fold), "group": row["id"], **row} for row in table]  # version 0.1 has no groups
            for setting, prefix in SETTINGS.items():
                if not prefix or f"{prefix}tp" in table[0]:
                    counts_of.setdefault(setting, []).append(_counts(table, prefix))
    groups = [row["group"] for row in rows]
    columns = [name for name in dict.fromkeys(itertools.chain.from_iterable(rows)) if all(name in row for row in rows)]
    pooled: dict[str, PooledScores] = {}
    for setting, counts in counts_of.items():
        if len(counts) < len(folds):  # scored in another way
            continue
        every = np.concatenate(counts)
        every[:, 0] = np.arange(len(every))
        summaries = [DiceSummary.of(each) for each in counts]
        pooled[setting] = PooledScores(
            pooled=ResolutionScores.of(DiceSummary.of(every), digest, groups),
            of_folds=tuple({name: getattr(each, name) for name in SCORE_NAMES} for each in summaries),
        )
    write_file(runs / PER_IMAGE_NAME, csv_bytes(columns, [[row[name] for name in columns] for row in rows]))
    scores = {setting: dataclasses.asdict(each) for setting, each in pooled.items()}
    write_file(runs / POOLED_NAME, json.dumps({"folds": len(folds), "scores": scores}, indent=1).encode() + b"\n")
    return pooled


def read_pooled(runs: Path) -> dict[str, PooledScores]:
    """Read the pooled scores of a finished cross-validation by setting. Raises CheckpointError for a damaged file."""
    with reading(runs / POOLED_NAME, "run the same isicdist crossval again"):
        scores: Mapping[str, Any] = parse_json((runs / POOLED_NAME).read_bytes())["scores"]
        return {setting: PooledScores.from_json(value) for setting, value in scores.items()}


def _read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or any(None in row.values() for row in rows):
        raise ValueError("a row is not whole" if rows else "no row")
    return rows


def _counts(table: Sequence[dict[str, str]], prefix: str) -> np.ndarray:
    """Read (number, TP, FP, FN) of each image, int64 (n, 4)."""
    return np.array(
        [[number, *(int(row[f"{prefix}{name}"]) for name in ("tp", "fp", "fn"))] for number, row in enumerate(table)]
    )
