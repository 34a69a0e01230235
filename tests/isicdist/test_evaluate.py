"""What an evaluation writes and prints: every score named, at both resolutions, on one process or more."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from isicdist import checkpoint
from isicdist.config import ModelConfig, TrainConfig
from isicdist.dice import DiceSummary
from isicdist.evaluate import evaluate
from isicdist.interval import NAMES
from isicdist.results import show
from isicdist.train import build_model, model_card
from shards.errors import UsageError
from shards.reader import ShardSet

CONFIG = TrainConfig(seed=1, model=ModelConfig(base_channels=2))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shard_set: Path) -> Path:
    """A run whose best model is as it was initialised, scored on val (with original masks) and train (without)."""
    path = tmp_path_factory.mktemp("runs") / "run"
    checkpoint.save_best(path, build_model(CONFIG), model_card(CONFIG, ShardSet.open(shard_set), 7, 0.5))
    evaluate(path, str(shard_set), "val")
    evaluate(path, str(shard_set), "train")
    return path


def summary_of(run: Path, split: str = "val") -> dict[str, Any]:
    return json.loads((run / "evaluation" / split / "summary.json").read_text())


def table_of(run: Path, name: str, split: str = "val") -> list[dict[str, str]]:
    with (run / "evaluation" / split / name).open(newline="") as file:
        return list(csv.DictReader(file))


def test_both_resolutions_are_named_with_n_and_intervals(run):
    record = summary_of(run)
    network, original = record["network_resolution"], record["original_resolution"]
    for block in (network, original):
        assert block["n"] == record["n"]
        for name in NAMES:
            low, high = block["interval_95"][name]
            assert 0 <= low <= block[name] <= high <= 1
    assert {name: network[name] for name in ("n", *NAMES)} == {name: record[name] for name in ("n", *NAMES)}
    assert original["mean_dice"] != network["mean_dice"]
    assert original["mean_dice"] == pytest.approx(network["mean_dice"], abs=0.02)


def test_the_images_add_up_to_the_original_scores(run, shard_set):
    rows = table_of(run, "per_image.csv")
    split = ShardSet.open(shard_set).split("val")
    counts = np.array([[int(row[f"original_{name}"]) for name in ("tp", "fp", "fn")] for row in rows])
    summary = DiceSummary.of(np.column_stack([np.arange(len(rows)), counts]))
    record = summary_of(run)["original_resolution"]
    assert {name: record[name] for name in ("n", *NAMES)} == summary.scores()
    for number, row in enumerate(rows):
        truth = split.original_mask(number)
        assert truth is not None
        assert (int(row["original_height"]), int(row["original_width"])) == truth.shape
        assert int(row["original_tp"]) + int(row["original_fn"]) == truth.sum()
        assert float(row["lesion_area"]) == pytest.approx(truth.mean())


def test_the_quartiles_hold_every_image_once_from_small_to_large(run):
    quartiles = summary_of(run)["lesion_area_quartiles"]
    rows = sorted(table_of(run, "per_image.csv"), key=lambda row: float(row["lesion_area"]))
    assert sum(part["n"] for part in quartiles) == len(rows)
    start = 0
    for part in quartiles:
        group = rows[start : start + part["n"]]
        assert part["mean_dice"] == pytest.approx(np.mean([float(row["original_dice"]) for row in group]))
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
    show(record, Console(file=text, width=120))
    line = next(line for line in text.getvalue().splitlines() if "thresholded jaccard" in line)
    low, high = record["network_resolution"]["interval_95"]["thresholded_jaccard"]
    assert f"{record['thresholded_jaccard']:.4f} ({low:.4f} to {high:.4f})" in line
    assert line.count(" to ") == columns
    assert f"best at {record['thresholds']['best_threshold']:g} " in text.getvalue()


def test_the_values_of_a_column_are_scored_apart(run, shard_set, tmp_path):
    rows = table_of(run, "per_image.csv")
    sexes = {row["id"]: ("female", "male")[place % 2] for place, row in enumerate(rows[1:])}
    table = tmp_path / "metadata.csv"
    table.write_text("image_id,sex\n" + "".join(f"{key},{sex}\n" for key, sex in sexes.items()))
    evaluate(run, str(shard_set), "val", f"{table}:sex")
    found = summary_of(run)["subgroups"]
    assert found["column"] == "sex"
    assert [group["value"] for group in found["groups"]] == ["", "female", "male"]
    for group in found["groups"]:
        dice = [float(row["original_dice"]) for row in rows if sexes.get(row["id"], "") == group["value"]]
        assert group["n"] == len(dice)
        assert group["mean_dice"] == pytest.approx(np.mean(dice))
    text = io.StringIO()
    show(summary_of(run), Console(file=text, width=120))
    assert "(none)" in text.getvalue()

    with pytest.raises(UsageError, match=r"write FILE\.csv:COLUMN"):
        evaluate(run, str(shard_set), "val", "sex")
    with pytest.raises(UsageError, match="no column 'age'"):
        evaluate(run, str(shard_set), "val", f"{table}:age")
    table.write_text("image_id,sex\nISIC_9,male\n")
    with pytest.raises(UsageError, match="it names none of the images"):
        evaluate(run, str(shard_set), "val", f"{table}:sex")


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
    for block in ("network_resolution", "original_resolution"):
        assert one[block]["n"] == two[block]["n"]
        for name in NAMES:  # a batch of other images may round a logit otherwise
            assert two[block][name] == pytest.approx(one[block][name], abs=1e-3)
