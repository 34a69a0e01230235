"""Cross-validation: every image is held out once, a second call goes on, and the pooled scores are exact."""

from __future__ import annotations

import csv
import json
import math
import shutil

import numpy as np
import pytest

from isicdist.cli import main
from isicdist.config import Fold
from isicdist.crossval import commands
from isicdist.errors import CheckpointError
from isicdist.metrics.pooled import pool_scores
from isicdist.metrics.results import PER_IMAGE_NAME
from isicdist.run_folder import CONFIG_NAME
from shards.reader import ShardSet

FLAGS = ("--epochs", "1", "--model.base-channels", "4", "--batch.global-size", "8", "--tracker", "none")


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def write_fold(runs, number: int, counts: list[tuple[int, int, int]]) -> None:
    folder = runs / f"fold-{number}" / "evaluation" / f"fold_{number}_of_2"
    folder.mkdir(parents=True)
    lines = [f"K{number}{i},{tp},{fp},{fn}" for i, (tp, fp, fn) in enumerate(counts)]
    (folder / PER_IMAGE_NAME).write_text("\n".join(["id,tp,fp,fn", *lines]) + "\n")


def test_scores_are_pooled_over_images_not_over_folds(tmp_path):
    write_fold(tmp_path, 1, [(8, 2, 2), (0, 4, 4), (5, 0, 0)])
    write_fold(tmp_path, 2, [(1, 1, 1)])
    (scores,) = pool_scores(tmp_path, [Fold(number=1, count=2), Fold(number=2, count=2)], "ab").values()
    assert scores.pooled.n == 4
    assert scores.pooled.mean_dice == pytest.approx((0.8 + 0 + 1 + 0.5) / 4)
    assert scores.pooled.pooled_dice == pytest.approx(2 * 14 / (2 * 14 + 7 + 7))
    assert [fold["mean_dice"] for fold in scores.of_folds] == pytest.approx([0.6, 0.5])
    assert scores.deviation("mean_dice") == pytest.approx(0.1 / math.sqrt(2))
    with (tmp_path / PER_IMAGE_NAME).open(newline="") as file:
        assert [(row["fold"], row["id"]) for row in csv.DictReader(file)] == [
            ("1/2", "K10"),
            ("1/2", "K11"),
            ("1/2", "K12"),
            ("2/2", "K20"),
        ]


def test_a_damaged_table_is_named(tmp_path):
    write_fold(tmp_path, 1, [])
    with pytest.raises(CheckpointError, match=r"per_image.csv: missing or damaged; remove it to score that fold again"):
        pool_scores(tmp_path, [Fold(number=1, count=2)], "ab")
    (tmp_path / "fold-1/evaluation/fold_1_of_2" / PER_IMAGE_NAME).write_text("id,dice\nA,0.5\n")
    with pytest.raises(CheckpointError, match=r"per_image.csv: missing or damaged; .* \(no 'tp'\)"):
        pool_scores(tmp_path, [Fold(number=1, count=2)], "ab")


def test_two_folds_train_score_and_go_on(shard_set, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("isicdist.crossval._run", lambda command: run(*command[3:]))  # python -m isicdist ..., in here
    words = ("crossval", "--data", shard_set, "--run", tmp_path, "--folds", 2, "--", *FLAGS)
    assert run(*words) == 0
    shards = ShardSet.open(shard_set)
    pool = {shards.split(name).key(index) for name in ("train", "val") for index in range(len(shards.split(name)))}
    with (tmp_path / PER_IMAGE_NAME).open(newline="") as file:
        held_out = [row["id"] for row in csv.DictReader(file)]
    assert sorted(held_out) == sorted(pool)
    written = json.loads((tmp_path / "crossval.json").read_text())
    assert written["folds"] == 2
    scores = written["scores"]["threshold 0.5, network resolution"]
    assert scores["pooled"]["n"] == len(pool)
    assert np.mean([fold["mean_dice"] for fold in scores["of_folds"]]) > 0
    capfd.readouterr()

    shutil.rmtree(tmp_path / "fold-2" / "evaluation")
    config = tmp_path / "fold-1" / CONFIG_NAME
    record = json.loads(config.read_text())
    config.write_text(json.dumps({**record, "optim": {**record["optim"], "lr": 1.0}}))
    assert run(*words) == 0
    printed = capfd.readouterr()
    assert "fold 1/2: scored before" in printed.out
    assert "fold 2/2: isicdist evaluate" in printed.out
    assert f"warning: fold 2/2 was trained with optim.lr {record['optim']['lr']}, fold 1/2 with 1.0\n" in printed.err
    config.write_text(json.dumps({**record, "data_digest": "another"}))
    assert run(*words) == 2
    assert "fold-1: scored on another shard set than" in capfd.readouterr().err
    config.write_text(json.dumps(record))
    assert json.loads((tmp_path / "crossval.json").read_text()) == written

    assert run("evaluate", "--ensemble", tmp_path, "--data", shard_set, "--split", "test") == 0
    page = tmp_path / "report.html"
    assert run("report", tmp_path, "--out", page) == 0
    printed = capfd.readouterr().out
    assert f"{len(pool)} held-out images of 2 folds" in printed
    assert "Gain of the ensemble over each model" in printed
    text = page.read_text()
    assert "Gain of the ensemble on test" in text
    assert all(f"Scores on {split}" in text for split in ("test", "fold_1_of_2", "fold_2_of_2"))
    assert run("report", tmp_path, tmp_path / "fold-1") == 2
    assert "is a cross-validation; report it alone" in capfd.readouterr().err
    (tmp_path / "crossval.json").write_text("{}")
    assert run("report", tmp_path) == 1
    assert "missing or damaged; run the same isicdist crossval again" in capfd.readouterr().err


def test_a_command_that_fails_ends_the_call_with_its_code(shard_set, tmp_path, capfd):
    assert run("crossval", "--data", shard_set, "--run", tmp_path, "--folds", 2, "--", "--epochs", 0) == 2
    said = capfd.readouterr().err
    assert "fold 1/2: ended with 2" in said
    assert "goes on" not in said
    assert not (tmp_path / "fold-2").exists()
    for folds in (1, 1000):
        assert run("crossval", "--data", shard_set, "--run", tmp_path / "none", "--folds", folds) == 2
    assert "make fewer folds" in capfd.readouterr().err
    assert not (tmp_path / "none").exists()


def test_the_commands_are_printed_for_a_scheduler(shard_set, tmp_path, capsys):
    words = ("--data", shard_set, "--run", tmp_path, "--folds", 3, "--launch", "launch/gpu8.yaml", "--print")
    assert run("crossval", *words, "--", *FLAGS) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("accelerate launch --config_file launch/gpu8.yaml -m isicdist train --data ")
    assert "--fold 2/3 --epochs 1" in lines[1]
    assert lines[1].endswith(f"evaluate --data {shard_set} --checkpoint {tmp_path / 'fold-2'} --fold 2/3")
    assert commands("d", tmp_path, Fold(number=1, count=2), [], None)[0][:2] == ["isicdist", "train"]
