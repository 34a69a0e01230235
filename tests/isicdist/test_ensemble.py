"""Ensembles: several runs or a cross-validation scored as one model, compared with each of its models, and exported."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from isicdist.cli import main
from isicdist.config import Fold, ModelConfig
from isicdist.errors import CheckpointError
from isicdist.evaluate import evaluate
from isicdist.export import export_onnx
from isicdist.metrics.dice import per_image_scores
from isicdist.metrics.summary import EvaluationSummary
from isicdist.metrics.tables import show_evaluation
from isicdist.network.best import ModelMetadata, ValidationScore, save_best
from isicdist.network.ensemble import load_ensemble
from isicdist.network.unet import ImprovedUNet
from shards.errors import UsageError
from shards.reader import ShardSet


def save_fold(runs: Path, shard_set: Path, fold: Fold, *, threshold: float = 0.5, size: int = 64) -> Path:
    torch.manual_seed(fold.number)
    metadata = ModelMetadata(
        architecture=ModelConfig(base_channels=2),
        size=size,
        fit="stretch",
        threshold=threshold,
        score=ValidationScore(split=fold.name, mean_dice=0.5),
        step=fold.number,
        data_digest=ShardSet.open(shard_set).digest,
    )
    save_best(runs / fold.run_name, ImprovedUNet(base_channels=2), metadata)
    return runs / fold.run_name


@pytest.fixture
def runs(tmp_path: Path, shard_set: Path) -> Path:
    """The models of a cross-validation of two folds, as they were initialised."""
    for fold in Fold(number=1, count=2).all:
        save_fold(tmp_path / "runs", shard_set, fold, threshold=fold.number / 4)
    return tmp_path / "runs"


def test_a_cross_validation_is_scored_as_the_mean_of_its_models_and_against_each(runs, shard_set):
    done = evaluate(runs, str(shard_set), "test")
    assert done is not None
    results, out = done
    assert out == runs / "evaluation" / "test"
    ensemble, split = load_ensemble([runs]), ShardSet.open(shard_set).split("test")
    assert ensemble.threshold == results.at_tuned.threshold == 3 / 8
    images = torch.from_numpy(np.stack([split.image(index) for index in range(len(split))])).permute(0, 3, 1, 2)
    probs = torch.stack([member(images) for member in ensemble.members]).mean(dim=0)[:, 0].numpy()
    truths = np.stack([split.mask(index) > 0 for index in range(len(split))])
    tp = [int((mask & truth).sum()) for mask, truth in zip(probs > 0.5, truths, strict=True)]
    assert results.at_default.network.rows[:, 1].tolist() == tp

    summary = EvaluationSummary.from_json(json.loads((out / "summary.json").read_text()))
    assert summary == results.summary
    assert summary.model_step == 2
    assert summary.ensemble is not None
    assert [each.run for each in summary.ensemble.members] == ["fold-1", "fold-2"]
    alone = []
    for each in summary.ensemble.members:
        single = evaluate(runs / each.run, str(shard_set), "test")
        assert single is not None
        assert single[0].summary.ensemble is None
        assert each.mean_dice == single[0].at_default.network.mean_dice
        assert each.gain.difference == pytest.approx(summary.at_default.network.mean_dice - each.mean_dice)
        alone.append(per_image_scores(single[0].at_default.network.rows)[0])
    low, high = summary.ensemble.gain.interval_95
    assert low <= summary.ensemble.gain.difference <= high
    mean = float(np.mean(alone))
    assert summary.ensemble.gain.difference == pytest.approx(summary.at_default.network.mean_dice - mean)
    text = io.StringIO()
    show_evaluation(summary, Console(file=text, width=120))
    assert "mean of the models" in text.getvalue()


def test_one_run_is_no_ensemble_and_several_need_a_folder(runs, shard_set, tmp_path):
    members = [runs / "fold-1", runs / "fold-2"]
    with pytest.raises(UsageError, match="give --out, the folder for the scores"):
        evaluate(members, str(shard_set), "test")
    done = evaluate(members, str(shard_set), "test", out=tmp_path / "scores")
    assert done is not None
    assert done[1] == tmp_path / "scores"
    assert (tmp_path / "scores" / "examples.png").exists()
    assert not (runs / "evaluation").exists()


def test_images_that_a_model_was_trained_on_are_refused(runs, shard_set):
    with pytest.raises(UsageError, match=r"fold-1: trained with fold_1_of_2 held out.*seen images of val"):
        evaluate(runs, str(shard_set), "val")
    with pytest.raises(UsageError, match=r"fold-2: .*seen images of fold_1_of_2"):
        evaluate(runs, str(shard_set), Fold(number=1, count=2))


def test_a_model_that_is_given_twice_is_refused(runs):
    with pytest.raises(CheckpointError, match=r"fold-1.*: given twice"):
        load_ensemble([runs, runs / "fold-1" / "best"])


def test_folds_that_are_missing_or_of_something_else_are_named(runs, shard_set, tmp_path):
    shutil.move(runs / "fold-1", tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"fold-1: fold 1/2 has no model yet; go on with isicdist crossval"):
        load_ensemble([runs])
    save_fold(runs, shard_set, Fold(number=1, count=3))
    with pytest.raises(CheckpointError, match=r"fold-2: not of fold 2/3, as the other runs are"):
        load_ensemble([runs])
    other = save_fold(tmp_path / "other", shard_set, Fold(number=1, count=2), size=128)
    with pytest.raises(CheckpointError, match=r"different inputs \(stretch to 128 pixels, stretch to 64 pixels\)"):
        evaluate([other, runs / "fold-2"], str(shard_set), "test", out=tmp_path / "scores")
    with pytest.raises(CheckpointError, match="there is no such folder"):
        load_ensemble([tmp_path / "nowhere"])


@pytest.mark.parametrize("words", [[], ["RUN", "--ensemble", "RUNS"]])
def test_a_model_or_an_ensemble_is_given(words, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["export", *words, "--out", str(tmp_path / "model.onnx")])
    assert ended.value.code == 2
    assert "give RUN, or --ensemble RUN1 RUN2 ... in its place" in capsys.readouterr().err


@pytest.mark.slow
def test_the_mean_of_an_ensemble_is_exported_as_one_file(runs, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = tmp_path / "ensemble.onnx"
    assert export_onnx([runs], out).differing_pixels == 0
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    described = json.loads(session.get_modelmeta().custom_metadata_map["isicdist"])
    assert (described["size"], described["threshold"]) == (64, 3 / 8)
    assert [member["step"] for member in described["members"]] == [1, 2]
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 64, 64), dtype=np.uint8)
    (probs,) = session.run(["probabilities"], {"images": images})
    np.testing.assert_allclose(probs, load_ensemble([runs])(torch.from_numpy(images)).numpy(), atol=2e-5, rtol=0)


def test_an_ensemble_is_the_same_in_any_order_of_its_runs(runs):
    one, other = runs / "fold-1", runs / "fold-2"
    assert load_ensemble([one, other]).identity() == load_ensemble([other, one]).identity()
    assert load_ensemble([one]).identity() != load_ensemble([other]).identity()
