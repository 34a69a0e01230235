"""wandb: offline without a login, one run per folder, and never a reason to stop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import wandb

from isicdist.training.tracking import Tracker, resolve_wandb_mode
from isicdist.training.tracking.wandb_log import WandbLog

pytestmark = pytest.mark.usefixtures("without_login")


def test_the_mode_is_offline_without_a_login(monkeypatch):
    assert resolve_wandb_mode()[0] == "offline"
    monkeypatch.setenv("WANDB_MODE", "online")
    assert resolve_wandb_mode()[0] == "offline", "online without a login would ask on the terminal"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert resolve_wandb_mode()[0] == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolve_wandb_mode()[0] == "disabled"


def test_a_disabled_wandb_logs_and_prints_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert WandbLog.start(tmp_path, {}, pytest.fail) is None
    assert list(tmp_path.iterdir()) == []


def test_offline_runs_of_one_folder_share_an_id(tmp_path, capsys, train_metrics, scores):
    run = tmp_path / "run"
    for step in (1, 2):
        with Tracker.open(run, {}, main=True, total_steps=10) as tracker:
            tracker.log_train(replace(train_metrics, step=step))
            tracker.log_evaluation(replace(scores, step=step))
        assert "wandb: offline" in capsys.readouterr().out
    identity = (run / "wandb-id").read_text().strip()
    assert {path.name for path in run.glob("wandb/offline-run-*/*.wandb")} == {f"run-{identity}.wandb"}


def test_values_are_named_by_train_and_split_with_a_step_axis(tmp_path, monkeypatch, train_metrics, scores):
    logged = []
    monkeypatch.setattr(wandb.Run, "log", lambda run, values: logged.append(values))
    with Tracker.open(tmp_path, {}, main=True, total_steps=10) as tracker:
        tracker.log_train(train_metrics)
        tracker.log_evaluation(scores)
    train, evaluation = logged
    assert (train["step"], train["train/loss"], train["train/data_wait"]) == (1, 0.5, 0.01)
    assert evaluation == {
        "step": 1,
        "val/n": 3,
        "val/mean_dice": 0.8,
        "val/pooled_dice": 0.7,
        "val/mean_jaccard": 0.6,
        "val/thresholded_jaccard": 0.5,
    }


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_failure_of_wandb_is_printed_once_and_training_goes_on(tmp_path, capsys, monkeypatch, train_metrics, broken):
    def fail(*args, **kwargs):
        raise wandb.Error("the dashboard\nis down")

    monkeypatch.setattr(wandb if broken == "init" else wandb.Run, broken, fail)
    with Tracker.open(tmp_path, {}, main=True, total_steps=10) as tracker:
        tracker.log_train(train_metrics)
        tracker.log_train(replace(train_metrics, step=2))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    printed = [line for line in capsys.readouterr().out.splitlines() if "the dashboard is down" in line]
    assert len(printed) == 1
