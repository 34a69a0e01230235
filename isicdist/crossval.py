"""Cross-validation: train and score every fold of a shard set, and pool the scores of all held-out images.

Each fold is a run of its own, RUNS/fold-K, trained and scored by the commands that `commands` gives; a fold that has
been scored is not trained again, and one that was stopped resumes.

The held-out images of a fold also choose its best model and threshold, as validation images do, so that scores are a
little higher than on images that nothing was chosen by; the split `test` is that.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from isicdist.config import Fold, TrainConfig, flat_settings
from isicdist.data.folds import open_folds
from isicdist.distributed.agree import StopSignal
from isicdist.errors import reading
from isicdist.metrics.pooled import POOLED_NAME, per_image_of, pool_scores
from isicdist.metrics.results import PER_IMAGE_NAME
from isicdist.metrics.tables import show_pooled
from isicdist.run_folder import CONFIG_NAME
from shards.errors import UsageError
from shards.format import parse_json
from shards.reader import ShardSet
from shards.urls import without_password


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
    open_folds(shards, folds)
    for fold in folds:
        if per_image_of(runs, fold).exists() and _record(runs, fold)["data_digest"] != shards.digest:
            raise UsageError(f"{run_of(runs, fold)}: scored on another shard set than {data}; give another --run")
    for fold in folds:
        if per_image_of(runs, fold).exists():
            print(f"fold {fold}: scored before")
            continue
        for command in commands(data, runs, fold, flags, config_file):
            print(without_password(f"fold {fold}: {shlex.join(command)}"), flush=True)
            code = _run([sys.executable, "-m", *command] if command[0] == "isicdist" else command)
            if code:
                advice = "" if code == UsageError.exit_code else "; the same command goes on"
                print(f"fold {fold}: ended with {code}{advice}", file=sys.stderr)
                return code
    for line in _differing_settings(runs, folds):
        print(f"warning: {line}", file=sys.stderr)
    show_pooled(pool_scores(runs, folds, shards.digest), Console())
    print(f"{runs / POOLED_NAME} holds these scores, {runs / PER_IMAGE_NAME} those of every image")
    return 0


def _record(runs: Path, fold: Fold) -> dict[str, Any]:
    """Read what the run of a fold was trained with. Raises CheckpointError."""
    path = run_of(runs, fold) / CONFIG_NAME
    with reading(path, "remove that folder to train the fold again"):
        record = parse_json(path.read_bytes())
        return {"data_digest": record["data_digest"], **{name: record.get(name) for name in TrainConfig().to_json()}}


def _differing_settings(runs: Path, folds: Sequence[Fold]) -> Iterator[str]:
    """Describe the settings in which the runs of the folds differ from the first."""
    first, *others = (flat_settings(_record(runs, fold)) for fold in folds)
    for fold, settings in zip(folds[1:], others, strict=True):
        for name, value in settings.items():
            if name != "fold" and value != first.get(name):
                yield f"fold {fold} was trained with {name} {value}, fold {folds[0]} with {first.get(name)}"


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
