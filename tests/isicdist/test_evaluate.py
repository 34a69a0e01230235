"""Evaluation: scores at both resolutions and thresholds, as files (metrics.results), tables and figures."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from rich.console import Console

from isicdist.config import ModelConfig, TrainConfig
from isicdist.errors import CheckpointError
from isicdist.evaluate import evaluate, relate
from isicdist.metrics import figures
from isicdist.metrics.dice import SCORE_NAMES, DiceSummary, per_image_scores
from isicdist.metrics.examples import PREDICTION_COLOUR, TRUTH_COLOUR
from isicdist.metrics.summary import EvaluationSummary
from isicdist.metrics.tables import show_evaluation
from isicdist.network.best import ModelMetadata, ValidationScore, save_best
from isicdist.network.ensemble import load_ensemble
from isicdist.network.seen import SeenImages
from isicdist.network.segmenter import load_model
from isicdist.train import build_model
from isicdist.training.scoring import validate
from shards import format
from shards.build import BuildOptions, build
from shards.errors import ShardSetError, UsageError
from shards.reader import ShardSet

CONFIG = TrainConfig(seed=1, model=ModelConfig(base_channels=2))
TUNED = 110 / 256
"""Threshold of the model."""
RESOLUTIONS = ("network_resolution", "original_resolution")


def metadata_of(shard_set: Path, threshold: float = 0.5) -> ModelMetadata:
    score = ValidationScore(mean_dice=0.5)
    return ModelMetadata.of(CONFIG.model, ShardSet.open(shard_set), step=7, score=score, threshold=threshold)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shard_set: Path) -> Path:
    """A run whose best model is as it was initialised, scored on val (with original masks) and train (without)."""
    path = tmp_path_factory.mktemp("runs") / "run"
    save_best(path, build_model(CONFIG), metadata_of(shard_set, threshold=TUNED))
    evaluate(path, str(shard_set), "val")
    evaluate(path, str(shard_set), "train")
    return path


def summary_of(run: Path, split: str = "val") -> dict[str, Any]:
    return json.loads((run / "evaluation" / split / "summary.json").read_text())


def table_of(run: Path, name: str, split: str = "val") -> list[dict[str, str]]:
    with (run / "evaluation" / split / name).open(newline="") as file:
        return list(csv.DictReader(file))


def scores_of(block: dict[str, Any]) -> dict[str, Any]:
    return {name: block[name] for name in ("n", *SCORE_NAMES)}


def test_both_thresholds_and_resolutions_are_named_with_n_and_intervals(run):
    record = summary_of(run)
    tuned = record["tuned_threshold"]
    assert (record["threshold"], tuned["threshold"]) == (0.5, TUNED)
    blocks = [scored[name] for scored in (record, tuned) for name in RESOLUTIONS]
    for block in blocks:
        assert block["n"] == record["n"]
        for name in SCORE_NAMES:
            low, high = block["interval_95"][name]
            assert 0 <= low <= block[name] <= high <= 1
    assert scores_of(record["network_resolution"]) == scores_of(record)
    assert len({block["mean_dice"] for block in blocks}) == 4
    for scored in (record, tuned):
        network, original = (scored[name]["mean_dice"] for name in RESOLUTIONS)
        assert original == pytest.approx(network, abs=0.02)


@pytest.mark.parametrize("prefix", ["", "original_", "tuned_threshold_", "tuned_threshold_original_"])
def test_the_images_add_up_to_the_scores(run, shard_set, prefix):
    rows = table_of(run, "per_image.csv")
    split = ShardSet.open(shard_set).split("val")
    assert [row["id"] for row in rows] == [split.key(number) for number in range(len(split))]
    counts = np.array([[int(row[f"{prefix}{name}"]) for name in ("tp", "fp", "fn")] for row in rows])
    summary = DiceSummary.of(np.column_stack([np.arange(len(rows)), counts]))
    record = summary_of(run)["tuned_threshold"] if prefix.startswith("tuned") else summary_of(run)
    resolution = "original_resolution" if prefix.endswith("original_") else "network_resolution"
    assert scores_of(record[resolution]) == summary.scores()
    dice, jaccard = per_image_scores(summary.rows)
    assert [float(row[f"{prefix}dice"]) for row in rows] == dice.tolist()
    assert [float(row[f"{prefix}jaccard"]) for row in rows] == jaccard.tolist()
    for number, row in enumerate(rows):
        original = split.original_mask(number)
        assert original is not None
        truth = original if prefix.endswith("original_") else split.mask(number)
        assert counts[number, 0] + counts[number, 2] == truth.sum()
        assert (int(row["original_height"]), int(row["original_width"])) == original.shape
        assert float(row["lesion_area"]) == pytest.approx(original.mean())


@pytest.mark.parametrize("tta", ["off", "d4"])
def test_the_images_are_scored_as_the_model_predicts_them(run, shard_set, tmp_path, tta):
    copied = shutil.copytree(run / "best", tmp_path / "run" / "best").parent
    result = evaluate(copied, str(shard_set), "test", tta=tta)
    assert result is not None
    results, out = result
    assert out == copied / "evaluation" / "test"
    record = json.loads((out / "summary.json").read_text())
    assert EvaluationSummary.from_json(record) == results.summary
    assert (record["tta"], record["model_step"], record["resolution"]) == (tta, 7, 64)
    split, model = ShardSet.open(shard_set).split("test"), load_model(copied)
    assert (record["data_digest"], record["n"]) == (split.digest, len(split))
    images = torch.from_numpy(np.stack([split.image(number) for number in range(len(split))])).permute(0, 3, 1, 2)
    with torch.inference_mode():
        predicted = (model(images, tta)[:, 0] > 0.5).sum(dim=(1, 2)).numpy()
    # A batch of another size may round otherwise.
    np.testing.assert_allclose(results.at_default.network.rows[:, 1:3].sum(axis=1), predicted, atol=4)


def test_the_quartiles_hold_every_image_once_from_small_to_large(run):
    quartiles = summary_of(run)["lesion_area_quartiles"]
    rows = sorted(table_of(run, "per_image.csv"), key=lambda row: float(row["lesion_area"]))
    assert sum(part["n"] for part in quartiles) == len(rows)
    start = 0
    for part in quartiles:
        group = rows[start : start + part["n"]]
        assert part["mean_dice"] == pytest.approx(
            np.mean([float(row["tuned_threshold_original_dice"]) for row in group])
        )
        assert part["least_area"] == float(group[0]["lesion_area"])
        assert part["largest_area"] == float(group[-1]["lesion_area"])
        start += part["n"]


def test_the_curve_meets_the_score_at_its_threshold(run):
    record = summary_of(run)
    rows = table_of(run, "thresholds.csv")
    assert [float(row["threshold"]) for row in rows] == [k / 256 for k in range(256)]
    assert float(rows[128]["pooled_dice"]) == record["pooled_dice"]
    best = max(rows[1:], key=lambda row: float(row["pooled_dice"]))
    assert record["thresholds"]["best_threshold"] == float(best["threshold"])
    assert record["thresholds"]["best_pooled_dice"] == float(best["pooled_dice"])
    assert sum(int(row["bin_pixels"]) for row in rows) == record["n"] * 64 * 64


def test_a_split_without_original_masks_has_the_networks_scores_alone(run):
    record = summary_of(run, "train")
    assert record["original_resolution"] is None
    assert record["network_resolution"]["n"] == record["n"]
    assert sum(part["n"] for part in record["lesion_area_quartiles"]) == record["n"]
    assert "original_dice" not in table_of(run, "per_image.csv", "train")[0]


@pytest.mark.parametrize(("split", "columns"), [("val", 2), ("train", 1)])
def test_the_tables_show_what_was_written(run, split, columns):
    text = io.StringIO()
    record = summary_of(run, split)
    show_evaluation(EvaluationSummary.from_json(record), Console(file=text, width=80))
    lines = text.getvalue().splitlines()
    official = [line for line in lines if "thresholded jaccard" in line]
    for line, scored in zip(official, (record, record["tuned_threshold"]), strict=True):
        score = scored["network_resolution"]
        low, high = score["interval_95"]["thresholded_jaccard"]
        assert f"{score['thresholded_jaccard']:.4f} ({low:.4f} to {high:.4f})" in line
        assert line.count(" to ") == columns
    assert [line.split()[2] for line in lines if "│ threshold " in line] == ["0.5", "0.4297"]
    assert f"pooled Dice is best at {record['thresholds']['best_threshold']:.4g} " in lines[-1]


def test_a_model_whose_threshold_is_a_half_shows_its_scores_once(run):
    record = summary_of(run)
    text = io.StringIO()
    same = {**record, "tuned_threshold": {name: record[name] for name in ("threshold", *RESOLUTIONS)}}
    show_evaluation(EvaluationSummary.from_json(same), Console(file=text))
    assert text.getvalue().count("thresholded jaccard") == 1


def test_a_training_chooses_the_threshold_that_an_evaluation_finds_best(run, shard_set):
    accelerator, split = Accelerator(cpu=True), ShardSet.open(shard_set).split("val")
    model = build_model(CONFIG)
    summary, curve = validate(model, split, accelerator, micro_size=16)
    record = summary_of(run)
    assert summary.scores() == scores_of(record)
    assert curve.best_threshold == record["thresholds"]["best_threshold"]


def test_the_worst_the_median_and_the_best_images_are_drawn_with_both_outlines(run, shard_set, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, out: drawn.append(figure))
    evaluate(run, str(shard_set), "val")
    rows = sorted(table_of(run, "per_image.csv"), key=lambda row: float(row["tuned_threshold_original_dice"]))
    shown = {axis.get_title().split("\n")[0] for axis in drawn[0].axes}
    worst, best = ({row["id"] for row in part} for part in (rows[:2], rows[-2:]))
    assert worst | best <= shown
    assert rows[len(rows) // 2]["id"] in shown
    assert [axis.get_ylabel() for axis in drawn[0].axes if axis.get_ylabel()] == ["worst", "median", "best"]
    (picture,) = (layer.get_array() for layer in drawn[0].axes[0].images)  # (H, W, 3)
    colours = {f"#{pixel.tobytes().hex()}" for pixel in picture.reshape(-1, 3)}
    assert {TRUTH_COLOUR, PREDICTION_COLOUR} <= colours


def test_the_values_of_a_column_are_scored_apart(run, shard_set, tmp_path):
    rows = table_of(run, "per_image.csv")
    sexes = {row["id"]: ("female", "male")[place % 2] for place, row in enumerate(rows[1:])}
    table = tmp_path / "metadata.csv"
    table.write_text("image_id,sex\n" + "".join(f"{key},{sex}\n" for key, sex in sexes.items()))
    evaluate(run, str(shard_set), "val", metadata=f"{table}:sex")
    found = summary_of(run)["subgroups"]
    assert found["column"] == "sex"
    assert [group["value"] for group in found["groups"]] == ["", "female", "male"]
    for group in found["groups"]:
        dice = [
            float(row["tuned_threshold_original_dice"]) for row in rows if sexes.get(row["id"], "") == group["value"]
        ]
        assert group["n"] == len(dice)
        assert group["mean_dice"] == pytest.approx(np.mean(dice))
    text = io.StringIO()
    show_evaluation(EvaluationSummary.from_json(summary_of(run)), Console(file=text, width=120))
    assert "(none)" in text.getvalue()

    with pytest.raises(UsageError, match=r"write FILE\.csv:COLUMN"):
        evaluate(run, str(shard_set), "val", metadata="sex")
    with pytest.raises(UsageError, match="no column 'age'"):
        evaluate(run, str(shard_set), "val", metadata=f"{table}:age")
    table.write_text("image_id,sex\nISIC_9,male\n")
    with pytest.raises(UsageError, match="it names none of the images"):
        evaluate(run, str(shard_set), "val", metadata=f"{table}:sex")


def test_excluded_images_are_scored_and_the_scores_without_them_added(run, shard_set, tmp_path):
    rows = table_of(run, "per_image.csv")
    excluded = [rows[0]["id"], rows[2]["id"]]
    table = tmp_path / "review.csv"
    table.write_text("id,verdict\n" + "".join(f"{key},wrong\n" for key in [*excluded, "ISIC_9"]))
    before = summary_of(run)
    evaluate(run, str(shard_set), "val", exclude=table)
    record = summary_of(run)
    without = record["without_excluded"]
    assert {**record, "without_excluded": None, "subgroups": None} == {**before, "subgroups": None}
    assert (without["table"], without["keys"]) == ("review.csv", excluded)
    dice = [float(row["original_dice"]) for row in rows if row["id"] not in excluded]
    assert without["original_resolution"]["n"] == len(dice) == record["n"] - 2
    assert without["original_resolution"]["mean_dice"] == pytest.approx(np.mean(dice))
    assert without["tuned_threshold"]["threshold"] == TUNED
    assert json.loads(json.dumps(EvaluationSummary.from_json(record).to_json())) == record
    text = io.StringIO()
    show_evaluation(EvaluationSummary.from_json(record), Console(file=text, width=120))
    assert "Without the 2 of them that review.csv excludes" in text.getvalue()
    table.write_text("id\n" + "".join(f"{row['id']}\n" for row in rows))
    with pytest.raises(UsageError, match="it excludes all images of val"):
        evaluate(run, str(shard_set), "val", exclude=table)


def test_images_that_were_trained_on_in_another_set_are_refused(archive, shard_set, tmp_path, capsys):
    shards = ShardSet.open(shard_set)
    seen = SeenImages.of(shards.split("train"), shards.split("val"))
    save_best(tmp_path / "run", build_model(CONFIG), metadata_of(shard_set), seen)
    dealt_anew, resized = tmp_path / "dealt-anew", tmp_path / "resized"
    options = BuildOptions(size=64, seed=3, split="train=0.4,val=0.2,test=0.4")
    build(str(archive[0]), str(archive[1]), dealt_anew, options)
    test = ShardSet.open(dealt_anew).split("test")
    trained = int(seen.trained_in(test).sum())
    assert 0 < trained < len(test)
    with pytest.raises(UsageError, match=f"run: trained on {trained} of the .* images of test in .*dealt-anew"):
        evaluate(tmp_path / "run", str(dealt_anew), "test")
    build(str(archive[0]), str(archive[1]), resized, BuildOptions(size=64, fit="pad"))
    with pytest.raises(CheckpointError, match=r"resized by stretch, .*resized was built with --fit pad; build the set"):
        evaluate(tmp_path / "run", str(resized), "test")


@pytest.mark.parametrize(
    ("split", "recorded", "relation"),
    [
        ("train", True, "trained on"),
        ("train", False, "trained on"),
        ("val", True, "chosen on"),
        ("val", False, "chosen on"),
        ("test", True, "held out"),
        ("test", False, "held out"),
    ],
)
def test_a_score_says_what_the_model_has_seen_of_the_images(shard_set, tmp_path, split, recorded, relation):
    shards = ShardSet.open(shard_set)
    seen = SeenImages.of(shards.split("train"), shards.split("val")) if recorded else None
    save_best(tmp_path / "run", build_model(CONFIG), metadata_of(shard_set), seen)
    ensemble = load_ensemble([tmp_path / "run"])
    assert relate(ensemble, shards.split(split)) == relation
    if not recorded:  # by a version that wrote no list
        assert relate(ensemble, dataclasses.replace(shards.split(split), digest="ab")) == "unknown"


def test_a_set_that_cannot_be_scored_is_refused(run, shard_set, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="no split 'tset'; it has test, train, val"):
        evaluate(run, str(shard_set), "tset")
    with pytest.raises(ShardSetError, match=r"no complete shard set \(no index\.json\); make one with"):
        evaluate(run, str(run), "test")
    whole = ShardSet.open(shard_set).split("test")

    def given(table: np.ndarray) -> None:
        monkeypatch.setattr(ShardSet, "split", lambda self, name: dataclasses.replace(whole, table=table))

    given(whole.table[:0])
    with pytest.raises(ShardSetError, match="split test holds no image; build the set again"):
        evaluate(run, str(shard_set), "test")
    given(whole.table[[0, 1, 1]])
    with pytest.raises(ShardSetError, match=f"split test holds {whole.key(1)} twice; build the set again"):
        evaluate(run, str(shard_set), "test")
    unmasked = whole.table.copy()
    unmasked["size"][2:, format.MASK] = 0
    given(unmasked)
    with pytest.raises(ShardSetError, match=f"{len(whole) - 2} images have no mask, the first {whole.key(2)}"):
        evaluate(run, str(shard_set), "test")


def test_one_image_is_scored_and_a_second_evaluation_replaces_the_first(shard_set, tmp_path, monkeypatch):
    save_best(tmp_path, build_model(CONFIG), metadata_of(shard_set))
    whole = ShardSet.open(shard_set).split("test")
    for count in (1, 2, 1):
        table = whole.table[:count]
        monkeypatch.setattr(ShardSet, "split", lambda *_, table=table: dataclasses.replace(whole, table=table))
        result = evaluate(tmp_path, str(shard_set), "test")
        assert result is not None
        with (result[1] / "per_image.csv").open(newline="") as file:
            dice = [float(row["dice"]) for row in csv.DictReader(file)]
        assert len(dice) == count
        assert result[0].at_default.network.mean_dice == pytest.approx(np.mean(dice))
        assert len(list((result[1] / "examples").glob("*.jpg"))) == count


def test_a_model_that_cannot_be_used_is_refused(run, shard_set, tmp_path):
    copied = shutil.copytree(run / "best", tmp_path / "run" / "best").parent
    card = json.loads((copied / "best" / "model.json").read_text())
    del card["checksum"]

    def refused(message: str, **changes: Any) -> None:
        (copied / "best" / "model.json").write_text(json.dumps({**card, **changes}))
        with pytest.raises(CheckpointError, match=message):
            evaluate(copied, str(shard_set), "test")

    refused(r"trained on images of 128 pixels.*holds 64; build the set with --size 128", size=128)
    refused("the weights are of another network", architecture={**card["architecture"], "base_channels": 4})
    refused("missing or damaged; copy the folder again", architecture={"name": "SegFormer"})
    refused(r"model\.safetensors: damaged", sha256="0" * 64)
    (copied / "best" / "model.json").write_text("{")
    with pytest.raises(CheckpointError, match="missing or damaged; copy the folder again"):
        evaluate(copied, str(shard_set), "test")
    with pytest.raises(CheckpointError, match="there is no such folder"):
        evaluate(tmp_path / "nowhere", str(shard_set), "test")
    assert not (copied / "evaluation").exists()


def test_a_network_that_overflows_is_refused(shard_set, tmp_path):
    model = build_model(CONFIG)
    with torch.no_grad():
        next(model.parameters()).fill_(math.inf)
    save_best(tmp_path, model, metadata_of(shard_set))
    with pytest.raises(CheckpointError, match=r"pixels of split val get no probability \(NaN\): the network overflows"):
        evaluate(tmp_path, str(shard_set), "val")
    assert not (tmp_path / "evaluation").exists()


def test_two_processes_write_what_one_does(run, shard_set, python, tmp_path):
    other = tmp_path / "run"
    (other / "best").mkdir(parents=True)
    for path in (run / "best").iterdir():
        (other / "best" / path.name).write_bytes(path.read_bytes())
    done = python(
        "-m", "isicdist", "evaluate", "--data", shard_set, "--checkpoint", other, "--split", "val", processes=2
    )
    assert done.returncode == 0, done.stderr
    one, two = summary_of(run), summary_of(other)
    for block in RESOLUTIONS:
        for of_one, of_two in ((one, two), (one["tuned_threshold"], two["tuned_threshold"])):
            assert of_one[block]["n"] == of_two[block]["n"]
            for name in SCORE_NAMES:  # a batch of other images may round a probability otherwise
                assert of_two[block][name] == pytest.approx(of_one[block][name], abs=1e-3)
