"""Runs to report on: made by the tracker, with a best model as it was initialised and evaluations of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from isicdist.config import ModelConfig, TrainConfig
from isicdist.evaluate import evaluate
from isicdist.network.best import ModelMetadata, ValidationScore, save_best
from isicdist.train import build_model
from isicdist.training.tracking import EvaluationMetrics, Tracker, TrainMetrics
from shards.reader import ShardSet

MakeRun = Callable[..., Path]
RECORD = {
    "world_size": 2,
    "mixed_precision": "bf16",
    "device": "cpu",
    "versions": {"isicdist": "0.1.0", "torch": "2.13.0+cpu"},
}


@pytest.fixture(scope="session")
def make_run(shard_set: Path) -> MakeRun:
    """Make a run of three steps in a folder, the second of which has the best model; `record` adds to config.json."""

    def make(folder: Path, seed: int = 1, **record: Any) -> Path:
        config, shards = (
            TrainConfig(seed=seed, log_every=1, model=ModelConfig(base_channels=2)),
            ShardSet.open(shard_set),
        )
        metadata = ModelMetadata.of(
            config.model, shards, step=2, score=ValidationScore(mean_dice=0.75), threshold=110 / 256
        )
        save_best(folder, build_model(config), metadata)
        values = {**config.to_json(), "data_digest": shards.digest, **RECORD, **record}
        with Tracker.open(folder, values, main=True, total_steps=3) as tracker:
            for step, dice in ((1, 0.25), (2, 0.75), (3, 0.625)):
                train = TrainMetrics(
                    step=step,
                    epoch=0,
                    samples=16 * step,
                    loss=math.nan if step == 1 else 1 / step,  # null in the file
                    pooled_dice=dice,
                    lr=1e-3,
                    grad_norm=1.0,
                    images_per_s=9.0,
                    data_wait=0.1,
                )
                tracker.log_train(train)
                scores = {"mean_dice": dice, "pooled_dice": 0.5, "mean_jaccard": 0.4, "thresholded_jaccard": 0.3}
                tracker.log_evaluation(EvaluationMetrics(step=step, split="val", n=9, **scores))
        return folder

    return make


@pytest.fixture
def run(tmp_path: Path, make_run: MakeRun) -> Path:
    """A run that is not evaluated yet."""
    return make_run(tmp_path / "run")


@pytest.fixture(scope="session")
def evaluated_runs(tmp_path_factory: pytest.TempPathFactory, make_run: MakeRun, shard_set: Path) -> tuple[Path, Path]:
    """Two runs from different seeds, evaluated on the test split; the second with subgroups. Read them, only."""
    folder = tmp_path_factory.mktemp("runs")
    split = ShardSet.open(shard_set).split("test")
    metadata = folder / "metadata.csv"
    names = ["<script>alert(1)</script>", "female"]
    rows = [f"{split.key(index)},{names[index % 2]}" for index in range(len(split))]
    metadata.write_text("\n".join(["image,sex", *rows]))
    first, second = make_run(folder / "first"), make_run(folder / "<b>second", seed=2)
    evaluate(first, str(shard_set), "test")
    evaluate(second, str(shard_set), "test", metadata=f"{metadata}:sex")
    return first, second
