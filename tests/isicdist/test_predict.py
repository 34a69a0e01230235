"""From a saved model to masks, scores and pictures."""

from __future__ import annotations

import csv
import io
import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from isicdist import checkpoint
from isicdist.augment import normalise, to_unit
from isicdist.config import ModelConfig, TrainConfig
from isicdist.evaluate import evaluate
from isicdist.predict import BATCH, Predicted, predict
from isicdist.report import report
from isicdist.tracking import Tracker
from isicdist.train import build_model, model_card
from shards.errors import CheckpointError, SourceError, UsageError
from shards.reader import ShardSet

CONFIG = TrainConfig(seed=1, model=ModelConfig(base_channels=2))


@pytest.fixture
def run(tmp_path: Path, shard_set: Path) -> Path:
    """A run whose best model is as it was initialised."""
    checkpoint.save_best(tmp_path / "run", build_model(CONFIG), model_card(CONFIG, ShardSet.open(shard_set), 7, 0.5))
    return tmp_path / "run"


@pytest.fixture
def images(tmp_path: Path, archive: tuple[Path, Path]) -> Path:
    """A folder of ten images of several sizes: more than one batch."""
    folder = tmp_path / "images"
    folder.mkdir()
    for path in sorted(archive[0].glob("*.jpg"))[: BATCH + 2]:
        shutil.copy(path, folder)
    assert len({pixels(path).shape for path in folder.iterdir()}) > 3
    return folder


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def masks(out: Path) -> dict[str, np.ndarray]:
    return {path.name: pixels(path) for path in out.glob("*.png")}


def test_a_mask_for_each_image_at_its_own_resolution(run, images, tmp_path):
    out = tmp_path / "out"
    done = predict(run, str(images), out)
    assert done == Predicted(masks=10, rejected=0)
    found = masks(out)
    assert sorted(path.name for path in out.iterdir()) == sorted(found)  # and nothing else
    assert set(found) == {f"{path.stem}_segmentation.png" for path in images.iterdir()}
    for path in images.iterdir():
        mask = found[f"{path.stem}_segmentation.png"]
        assert mask.shape == pixels(path).shape[:2]
        assert mask.dtype == np.uint8
        assert set(np.unique(mask)) <= {0, 255}


def test_a_mask_is_what_the_network_says(run, images, tmp_path):
    predict(run, str(images), tmp_path / "out")
    model, card = checkpoint.load_model(run)
    path = sorted(images.iterdir())[-1]  # in the second batch
    picture = Image.fromarray(pixels(path))
    small = np.array(picture.resize((64, 64), Image.Resampling.BOX))
    with torch.inference_mode():
        probs = model(normalise(to_unit(torch.from_numpy(small)[None].permute(0, 3, 1, 2)))).sigmoid()[0, 0]
    expected = np.asarray(Image.fromarray(probs.numpy()).resize(picture.size, Image.Resampling.BILINEAR))
    mask = masks(tmp_path / "out")[f"{path.stem}_segmentation.png"]
    assert 0.02 < mask.mean() / 255 < 0.98  # neither side is trivial
    assert ((mask > 0) == (expected > card["threshold"])).mean() > 0.999


def test_an_archive_gives_the_same_masks(run, images, tmp_path):
    packed = tmp_path / "images.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for path in images.iterdir():
            archive.write(path, f"ISIC/{path.name}")
        archive.writestr("ISIC/LICENSE.txt", "CC0")
    predict(run, str(images), tmp_path / "one")
    predict(run / "best", str(packed), tmp_path / "two")
    one, two = masks(tmp_path / "one"), masks(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_an_image_that_cannot_be_read_is_listed_and_the_others_are_done(run, images, tmp_path):
    out = tmp_path / "out"
    names = sorted(path.name for path in images.iterdir())
    bad = [names[1], names[9]]
    (images / bad[0]).write_bytes(b"\xff\xd8\xff\xe0 no jpeg")
    (images / bad[1]).write_bytes((images / names[2]).read_bytes()[:900])
    done = predict(run, str(images), out)
    assert done == Predicted(masks=8, rejected=2)
    assert len(masks(out)) == 8
    with (out / "rejected.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == bad
    assert all(row["reason"] in ("unreadable", "truncated") and row["detail"] for row in rows)

    for name in bad:  # mended: the list of the first time is gone
        shutil.copy(images / names[2], images / name)
    assert predict(run, str(images), out) == Predicted(masks=10, rejected=0)
    assert len(masks(out)) == 10
    assert not (out / "rejected.csv").exists()


def test_nothing_to_predict_and_two_of_one_name_are_refused(run, images, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="empty"):
        predict(run, str(tmp_path / "empty"), tmp_path / "out")
    with pytest.raises(SourceError, match="none"):
        predict(run, str(tmp_path / "none"), tmp_path / "out")
    first = sorted(images.iterdir())[0]
    shutil.copy(first, first.with_suffix(".jpeg"))
    with pytest.raises(SourceError, match="would have one mask; rename one of them") as caught:
        predict(run, str(images), tmp_path / "out")
    assert first.name in str(caught.value)
    with pytest.raises(CheckpointError, match="no best model yet"):
        predict(images, str(images), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_evaluation_adds_up(run, shard_set):
    result = evaluate(run, str(shard_set), "test")
    assert result is not None
    summary, out = result
    assert out == run / "evaluation" / "test"
    split = ShardSet.open(shard_set).split("test")
    record = json.loads((out / "summary.json").read_text())
    assert record["n"] == summary.n == len(split)
    assert (record["data_digest"], record["resolution"], record["model_step"]) == (split.digest, 64, 7)

    with (out / "per_image.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [split.key(number) for number in range(len(split))]
    tp, fp, fn = (np.array([int(row[name]) for row in rows]) for name in ("tp", "fp", "fn"))
    dice, jaccard = 2 * tp / (2 * tp + fp + fn), tp / (tp + fp + fn)
    np.testing.assert_allclose([float(row["dice"]) for row in rows], dice, rtol=1e-12)
    np.testing.assert_allclose([float(row["jaccard"]) for row in rows], jaccard, rtol=1e-12)
    assert record["mean_dice"] == pytest.approx(dice.mean(), rel=1e-12)
    assert record["pooled_dice"] == pytest.approx(2 * tp.sum() / (2 * tp + fp + fn).sum(), rel=1e-12)
    assert record["mean_jaccard"] == pytest.approx(jaccard.mean(), rel=1e-12)
    assert record["thresholded_jaccard"] == pytest.approx((jaccard * (jaccard >= 0.65)).mean(), rel=1e-12)
    for number in range(len(split)):
        assert tp[number] + fn[number] == split.mask(number).sum()

    model, _ = checkpoint.load_model(run)
    with torch.inference_mode():
        logits = model(normalise(to_unit(torch.from_numpy(split.image(3).copy())[None].permute(0, 3, 1, 2))))
    prediction = logits[0, 0].numpy() > 0
    assert abs(int(prediction.sum()) - int(tp[3] + fp[3])) <= 2  # a batch of another size may round otherwise
    with Image.open(out / "examples.png") as picture:
        assert picture.width > 500
        assert picture.height > picture.width  # six rows of three


def test_a_set_of_another_size_or_split_is_refused(run, shard_set):
    with pytest.raises(UsageError, match="no split 'tset'"):
        evaluate(run, str(shard_set), "tset")
    card = {**json.loads((run / "best" / "model.json").read_text()), "size": 128}
    (run / "best" / "model.json").write_text(json.dumps(card))
    with pytest.raises(
        CheckpointError, match=r"trained on images of 128 pixels.*holds 64; build the set with --size 128"
    ):
        evaluate(run, str(shard_set), "test")
    assert not (run / "evaluation").exists()


def test_a_report_shows_scores_and_curves(run, shard_set):
    config = {**replace(CONFIG, log_every=1).to_json(), "world_size": 2, "mixed_precision": "bf16"}
    quiet = Console(quiet=True)
    scores = {"pooled_dice": 0.5, "mean_jaccard": 0.4, "thresholded_jaccard": 0.3}
    with Tracker.open(run, config, main=True, wandb_mode="disabled", console=quiet) as tracker:
        for step, dice in ((1, 0.25), (2, 0.75), (3, 0.625)):
            loss = float("nan") if step == 1 else 1 / step  # null in the file
            tracker.log_train(
                step=step,
                epoch=0,
                samples=16 * step,
                loss=loss,
                pooled_dice=dice,
                lr=1e-3,
                grad_norm=1.0,
                images_per_s=9.0,
                data_wait=0.1,
            )
            tracker.log_evaluation(step=step, split="val", n=9, mean_dice=dice, **scores)
    result = evaluate(run, str(shard_set), "test")
    assert result is not None
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "tra')  # what a killed machine leaves

    text = io.StringIO()
    report(run, Console(file=text, width=160))
    shown = text.getvalue()
    assert "step 3 · epoch 0 · 48 samples · 2 processes · bf16 · global batch 16" in shown
    best = next(line for line in shown.splitlines() if "val (best)" in line)
    assert "0.7500" in best
    test = next(line for line in shown.splitlines() if "│ test" in line)
    assert f"{result[0].mean_dice:.4f}" in test
    assert str(run / "evaluation" / "test" / "examples.png") in shown
    with Image.open(run / "report.png") as picture:
        assert picture.width > 500


def test_a_report_of_no_run_or_an_empty_one_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="not a run"):
        report(tmp_path, Console(quiet=True))
    with Tracker.open(tmp_path, {}, main=True, wandb_mode="disabled", console=Console(quiet=True)):
        pass
    with pytest.raises(CheckpointError, match="nothing is logged in it yet"):
        report(tmp_path, Console(quiet=True))
