"""Cross-validation: train and score every fold of a shard set, and pool the scores of all held-out images.

Each fold is a run of its own, RUNS/fold-K, trained and scored by the commands that `commands` gives; a fold that has
been scored is not trained again, and one that was stopped resumes.

The held-out images of a fold also choose its best model and threshold, as validation images do, so that scores are a
little higher than on images that nothing was chosen by; the split `test` is that.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Self

import numpy as np
from rich.console import Console
from rich.table import Table

from isicdist.config import Fold, TrainConfig, flat_settings
from isicdist.data.folds import check_folds
from isicdist.distributed.agree import StopSignal
from isicdist.errors import CheckpointError
from isicdist.metrics.dice import SCORE_NAMES, DiceSummary
from isicdist.metrics.results import PER_IMAGE_NAME
from isicdist.metrics.summary import ResolutionScores
from isicdist.training.tracking import CONFIG_NAME
from shards.errors import UsageError
from shards.files import write_file
from shards.format import parse_json
from shards.reader import ShardSet
from shards.tables import csv_bytes

SUMMARY_NAME = "crossval.json"
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
    """Scores of all images, each predicted by the model that has not seen it, with intervals over images."""
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


def folds_of(count: int) -> list[Fold]:
    """List the folds of a cross-validation. Raises UsageError for fewer than two."""
    if count < 2:
        raise UsageError(f"--folds {count}: give at least 2")
    return Fold(number=1, count=count).all


def commands(data: str, runs: Path, fold: Fold, flags: Sequence[str], config_file: Path | None) -> list[list[str]]:
    """Give the commands that train and score a fold. `flags`: of `isicdist train`. `config_file`: of accelerate."""
    launcher = ["accelerate", "launch", "--config_file", str(config_file), "-m"] if config_file else []
    start = [*launcher, "isicdist"]
    run = str(run_of(runs, fold))
    return [
        [*start, "train", "--data", data, "--run", run, "--fold", str(fold), *flags],
        [*start, "evaluate", "--data", data, "--checkpoint", run, "--fold", str(fold)],
    ]


def run_of(runs: Path, fold: Fold) -> Path:
    """Locate the run of a fold."""
    return runs / fold.run_name


def print_commands(data: str, runs: Path, count: int, flags: Sequence[str], config_file: Path | None) -> None:
    """Print one line for each fold, to start by hand or in the array of a scheduler."""
    for fold in folds_of(count):
        print(" && ".join(map(shlex.join, commands(data, runs, fold, flags, config_file))))


def crossval(data: str, runs: Path, count: int, flags: Sequence[str], config_file: Path | None) -> int:
    """Train and score the folds one after the other, then print and write the pooled scores.

    Returns 0, or the exit code of the command that has failed or was stopped; the same call goes on. Raises UsageError
    for fewer than two folds, for more than there are images and for folds of another shard set, CheckpointError where
    the score of a fold is damaged, and what `ShardSet.open` raises.
    """
    shards, folds = ShardSet.open(data), folds_of(count)
    check_folds(shards, folds)
    for fold in folds:
        if _per_image(runs, fold).exists() and _record(runs, fold)["data_digest"] != shards.digest:
            raise UsageError(f"{run_of(runs, fold)}: scored on another shard set than {data}; give another --run")
    for fold in folds:
        if _per_image(runs, fold).exists():
            print(f"fold {fold}: scored before")
            continue
        for command in commands(data, runs, fold, flags, config_file):
            print(f"fold {fold}: {shlex.join(command)}", flush=True)
            code = _run([sys.executable, "-m", *command] if command[0] == "isicdist" else command)
            if code:
                advice = "" if code == UsageError.exit_code else "; the same command goes on"
                print(f"fold {fold}: ended with {code}{advice}", file=sys.stderr)
                return code
    for line in _differing_settings(runs, folds):
        print(f"warning: {line}", file=sys.stderr)
    scores = pool_scores(runs, folds, shards.index.digest)
    show(scores, Console())
    rows = {setting: dataclasses.asdict(each) for setting, each in scores.items()}
    write_file(runs / SUMMARY_NAME, json.dumps({"folds": count, "scores": rows}, indent=1).encode() + b"\n")
    print(f"{runs / SUMMARY_NAME} holds these scores, {runs / PER_IMAGE_NAME} those of every image")
    return 0


def pool_scores(runs: Path, folds: Sequence[Fold], digest: str) -> dict[str, PooledScores]:
    """Pool the counts of all held-out images by setting, and write RUNS/per_image.csv with a column `fold` before them.

    `digest`: of the shard set, which seeds the bootstrap. Raises CheckpointError for a table that is damaged.
    """
    tables = [_read_table(_per_image(runs, fold)) for fold in folds]
    columns = list(tables[0][0])
    rows = [[str(fold), *row.values()] for fold, table in zip(folds, tables, strict=True) for row in table]
    write_file(runs / PER_IMAGE_NAME, csv_bytes(("fold", *columns), rows))
    pooled: dict[str, PooledScores] = {}
    for setting, prefix in SETTINGS.items():
        if f"{prefix}tp" not in columns:
            continue
        counts = [_counts(table, prefix) for table in tables]
        every = np.concatenate(counts)
        every[:, 0] = np.arange(len(every))
        summaries = [DiceSummary.of(each) for each in counts]
        pooled[setting] = PooledScores(
            pooled=ResolutionScores.of(DiceSummary.of(every), digest),
            of_folds=tuple({name: getattr(each, name) for name in SCORE_NAMES} for each in summaries),
        )
    return pooled


def read_scores(runs: Path) -> dict[str, PooledScores]:
    """Read the pooled scores of a finished cross-validation by setting. Raises CheckpointError for a damaged file."""
    path = runs / SUMMARY_NAME
    try:
        scores: Mapping[str, Any] = parse_json(path.read_bytes())["scores"]
        return {setting: PooledScores.from_json(value) for setting, value in scores.items()}
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: missing or damaged; run the same isicdist crossval again") from error


def _record(runs: Path, fold: Fold) -> dict[str, Any]:
    """Read what the run of a fold was trained with. Raises CheckpointError."""
    path = run_of(runs, fold) / CONFIG_NAME
    try:
        record = parse_json(path.read_bytes())
        return {"data_digest": record["data_digest"], **{name: record.get(name) for name in TrainConfig().to_json()}}
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: missing or damaged; remove that folder to train the fold again") from error


def _differing_settings(runs: Path, folds: Sequence[Fold]) -> Iterator[str]:
    """Describe the settings in which the runs of the folds differ from the first."""
    first, *others = (flat_settings(_record(runs, fold)) for fold in folds)
    for fold, settings in zip(folds[1:], others, strict=True):
        for name, value in settings.items():
            if name != "fold" and value != first.get(name):
                yield f"fold {fold} was trained with {name} {value}, fold {folds[0]} with {first.get(name)}"


def _per_image(runs: Path, fold: Fold) -> Path:
    return run_of(runs, fold) / "evaluation" / fold.name / PER_IMAGE_NAME


def _read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or any(None in row.values() for row in rows):
        raise CheckpointError(f"{path}: damaged; remove it to score that fold again")
    return rows


def _counts(table: Sequence[dict[str, str]], prefix: str) -> np.ndarray:
    """Read (number, TP, FP, FN) of each image, int64 (n, 4)."""
    return np.array(
        [[number, *(int(row[f"{prefix}{name}"]) for name in ("tp", "fp", "fn"))] for number, row in enumerate(table)]
    )


def show(scores: Mapping[str, PooledScores], console: Console) -> None:
    """Print the pooled scores of all held-out images, and their spread over the folds."""
    number = len(next(iter(scores.values())).of_folds)
    n = next(iter(scores.values())).pooled.n
    table = Table(title=f"{n} held-out images of {number} folds: 95 % interval over images, deviation over folds")
    table.add_column("score")
    table.add_column("all images", justify="right")
    table.add_column("of a fold", justify="right")
    for setting, each in scores.items():
        table.add_section()
        table.add_row(setting, style="bold")
        for name in SCORE_NAMES:
            low, high = each.pooled.interval_95[name]
            table.add_row(
                name.replace("_", " "),
                f"{getattr(each.pooled, name):.4f} ({low:.4f} to {high:.4f})",
                f"{each.mean(name):.4f} ± {each.deviation(name):.4f}",
            )
    console.print(table)


def _run(command: Sequence[str]) -> int:
    """Run a command and hand on stop signals to it, so that it saves and is waited for; returns its exit code."""
    process = subprocess.Popen(command)

    def hand_on(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    previous = {number: signal.signal(number, hand_on) for number in StopSignal.SIGNALS}
    try:
        return process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
