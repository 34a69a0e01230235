"""Dashboards: chosen by name, told apart from what is not installed, and TensorBoard and trackio read back."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from isicdist.metrics.examples import PREDICTION_COLOUR, TRUTH_COLOUR
from isicdist.training.tracking import EvaluationDetails, Tracker
from shards.errors import UsageError


def read_board(run: Path) -> EventAccumulator:
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    return board.Reload()


@pytest.mark.parametrize("main", [True, False])
def test_a_dashboard_that_is_not_installed_is_named_with_its_extra_on_every_rank(tmp_path, monkeypatch, main):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"--tracker trackio: not installed; pip install 'isicdist\[trackio\]'"):
        Tracker.open(tmp_path / "run", {"tracker": ["trackio"]}, main=main, total_steps=10)
    assert not (tmp_path / "run").exists()


def test_no_dashboard_leaves_only_the_log(tmp_path, train_metrics, scores):
    with Tracker.open(tmp_path, {"tracker": ["none"]}, main=True, total_steps=10) as tracker:
        tracker.log_train(train_metrics)
        tracker.log_evaluation(scores, pytest.fail)  # nobody predicts images for nobody
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "metrics.jsonl"]


def test_details_are_made_once_for_all_dashboards_and_their_failure_is_survived(
    tmp_path, capsys, train_metrics, scores
):
    made: list[int] = []

    def make() -> EvaluationDetails:
        made.append(1)
        raise RuntimeError("out of memory")

    config = {"tracker": ["tensorboard"]}
    with Tracker.open(tmp_path, config, main=True, total_steps=10) as tracker:
        tracker.log_train(train_metrics)
        tracker.log_evaluation(scores, make)
        tracker.log_evaluation(scores, make)
    assert made == [1]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert "tensorboard: off for the rest of this run: out of memory" in capsys.readouterr().out


def test_tensorboard_holds_scalars_curves_and_pictures(tmp_path, train_metrics, scores, details):
    config = {"tracker": ["tensorboard"], "world_size": 2, "seed": 3}
    with Tracker.open(tmp_path, config, main=True, total_steps=10) as tracker:
        for step in (1, 2, 3):
            tracker.log_train(replace(train_metrics, step=step))
        tracker.log_evaluation(scores, lambda: details)
    board = read_board(tmp_path)
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3]
    assert board.Scalars("train/images_per_s_per_device")[0].value == 8.5
    assert board.Scalars("val/average_precision")[0].value == pytest.approx(0.9)
    assert board.Histograms("val/dice")[0].histogram_value.num == 3
    assert [(event.width, event.height) for event in board.Images("val/fixed")] == [(96, 32)]  # side by side
    assert board.Tensors("val/thresholds")
    (text,) = board.Tensors("config/text_summary")
    assert '"seed": 3' in text.tensor_proto.string_val[0].decode()


def test_tensorboard_hides_the_steps_that_a_resumed_run_trains_again(tmp_path, train_metrics, scores, details):
    for start, loss in ((1, 0.5), (3, 0.25)):
        with Tracker.open(tmp_path, {"tracker": ["tensorboard"]}, main=True, total_steps=10) as tracker:
            tracker.truncate_after(start - 1)
            for step in range(start, start + 4):
                tracker.log_train(replace(train_metrics, step=step, loss=loss))
    with Tracker.join(tmp_path) as tracker:
        tracker.log_evaluation(replace(scores, split="test", step=6), lambda: details)
    board = read_board(tmp_path)
    losses = [(event.step, event.value) for event in board.Scalars("train/loss")]
    assert losses == [(1, 0.5), (2, 0.5), (3, 0.25), (4, 0.25), (5, 0.25), (6, 0.25)]
    assert board.Scalars("test/mean_dice")[0].step == 6


def test_an_evaluation_joins_only_dashboards_that_have_the_run(tmp_path, scores, details):
    (tmp_path / "config.json").write_text(json.dumps({"tracker": ["wandb", "tensorboard"]}))
    with Tracker.join(tmp_path) as tracker:
        tracker.log_evaluation(scores, lambda: details)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_outlines_are_drawn_into_a_copy(details):
    example = details.examples[0]
    drawn = example.outlined()
    assert example.image.max() == 80
    assert "#" + drawn[8, 8].tobytes().hex() == TRUTH_COLOUR
    assert "#" + drawn[8, 24].tobytes().hex() == PREDICTION_COLOUR
    assert np.array_equal(drawn[16, 16], example.image[16, 16])


def test_trackio_holds_scalars_and_pictures(tmp_path, monkeypatch, capsys, train_metrics, scores, details):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage  # pyright: ignore[reportMissingImports]

    run, config = tmp_path / "run", {"tracker": ["trackio"], "seed": 3}
    with Tracker.open(run, config, main=True, total_steps=10) as tracker:
        tracker.log_train(train_metrics)
    with Tracker.join(run) as tracker:
        tracker.log_evaluation(scores, lambda: details)
    name = f"run-{(run / 'trackio-id').read_text().strip()}"
    train, evaluation = SQLiteStorage.get_logs("isicdist", name)
    assert (train["step"], train["train/loss"], train["samples"]) == (1, 0.5, 32)
    assert evaluation["val/mean_dice"] == 0.8
    assert len(evaluation["val/fixed_images"]["_value"]) == 2
    assert "off for the rest" not in capsys.readouterr().out


def test_wandb_that_is_switched_off_need_not_be_installed(tmp_path, monkeypatch, train_metrics):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with Tracker.open(tmp_path / "run", {"tracker": ["wandb"]}, main=True, total_steps=10) as tracker:
        tracker.log_train(train_metrics)
    monkeypatch.delenv("WANDB_MODE")
    with pytest.raises(UsageError, match=r"--tracker wandb: not installed; pip install wandb, or choose another"):
        Tracker.open(tmp_path / "run", {"tracker": ["wandb"]}, main=True, total_steps=10)
