"""Report of a run: a table of scores, and curves."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from isicdist.config import ModelConfig, TrainConfig
from isicdist.errors import CheckpointError
from isicdist.evaluate import evaluate
from isicdist.network.best import ModelMetadata, ValidationScore, save_best
from isicdist.report import report
from isicdist.train import build_model
from isicdist.training.tracking import EvaluationMetrics, Tracker, TrainMetrics
from shards.reader import ShardSet

CONFIG = TrainConfig(seed=1, log_every=1, model=ModelConfig(base_channels=2))
QUIET = Console(quiet=True)


@pytest.fixture
def run(tmp_path: Path, shard_set: Path) -> Path:
    """A run of three steps, the second of which has the best model."""
    shards, config = ShardSet.open(shard_set), {**CONFIG.to_json(), "world_size": 2, "mixed_precision": "bf16"}
    score = ValidationScore(mean_dice=0.75)
    metadata = ModelMetadata.of(CONFIG.model, shards, step=2, score=score, threshold=110 / 256)
    save_best(tmp_path, build_model(CONFIG), metadata)
    with Tracker.open(tmp_path, config, main=True, total_steps=3) as tracker:
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
    return tmp_path


def shown(run: Path, width: int = 80) -> str:
    text = io.StringIO()
    report(run, Console(file=text, width=width))
    return text.getvalue()


def test_a_report_shows_scores_and_curves(run, shard_set):
    assert "best model: step 2\n" in shown(run)  # nothing is evaluated yet
    with Image.open(run / "report.png") as picture:
        height = picture.height
    evaluate(run, str(shard_set), "test")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "tra')  # what a killed machine leaves

    text = shown(run)
    assert "step 3 · epoch 0 · 48 samples · 2 processes · bf16 · global batch 16" in text
    rows = [line.split() for line in text.splitlines() if line.startswith(("val", "test"))]
    assert rows[0] == ["val", "(best)", "network", "0.5", "9", "0.7500", "0.5000", "0.4000", "0.3000"]
    record = json.loads((run / "evaluation" / "test" / "summary.json").read_text())
    for scored, threshold, found in ((record, "0.5", rows[1:3]), (record["tuned_threshold"], "0.4297", rows[3:])):
        for words, resolution in zip(found, ("network", "original"), strict=True):
            scores = scored[f"{resolution}_resolution"]
            assert words[:4] == ["test", resolution, threshold, str(record["n"])]
            assert words[4] == f"{scores['mean_dice']:.4f}"
            assert words[7] == f"{scores['thresholded_jaccard']:.4f}"
    assert str(run / "evaluation" / "test" / "examples.png") in text
    with Image.open(run / "report.png") as picture:
        assert picture.height > 1.5 * height  # the curves of the thresholds have come in below


def test_an_evaluation_of_an_earlier_model_is_pointed_out(run, shard_set):
    evaluate(run, str(shard_set), "test")
    assert "evaluate it again" not in shown(run)
    path = run / "evaluation" / "test" / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_step": 1}))
    assert "test was evaluated at step 1: evaluate it again" in shown(run)
    path.write_text("{}")
    with pytest.raises(CheckpointError, match=r"summary\.json: of an older isicdist; evaluate the split again"):
        shown(run)


def test_a_report_of_no_run_or_an_empty_one_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="not a run"):
        report(tmp_path, QUIET)
    with Tracker.open(tmp_path, {}, main=True, total_steps=3):
        pass
    with pytest.raises(CheckpointError, match="nothing is logged in it yet"):
        report(tmp_path, QUIET)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: damaged, not JSON"):
        report(tmp_path, QUIET)
