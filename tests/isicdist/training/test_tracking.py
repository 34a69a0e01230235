"""The record of a run: what is in it, who writes it, and what can't stop it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from rich.console import Console

from isicdist.errors import TrainingError
from isicdist.training.tracking import Tracker, resolve_wandb_mode

TRAIN: dict[str, Any] = {
    "epoch": 0,
    "samples": 32,
    "loss": 0.5,
    "pooled_dice": 0.25,
    "lr": 1e-3,
    "grad_norm": 1.5,
    "images_per_s": 17.0,
    "data_wait": 0.01,
    "skipped": 0,
}
SCORES: dict[str, Any] = {
    "n": 3,
    "mean_dice": 0.8,
    "pooled_dice": 0.7,
    "mean_jaccard": 0.6,
    "thresholded_jaccard": 0.5,
}


def opened(run: Path, *, main: bool = True, wandb_mode: str = "disabled", terminal: bool = False) -> Tracker:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    return Tracker.open(run, {}, main=main, total_steps=10, wandb_mode=wandb_mode, console=console)


def printed(tracker: Tracker) -> str:
    file = tracker._console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def events(run: Path) -> list[dict]:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_events_have_the_keys_of_the_design_in_order(tmp_path):
    with opened(tmp_path / "run") as tracker:
        tracker.log_train(step=1, **TRAIN)
        tracker.log_evaluation(step=1, split="val", **SCORES)
    train, evaluate = events(tmp_path / "run")
    assert list(train.items()) == [("event", "train"), ("step", 1), *TRAIN.items()]
    assert list(evaluate.items()) == [("event", "evaluate"), ("step", 1), ("split", "val"), *SCORES.items()]


def test_the_config_is_written_beside_the_events(tmp_path):
    config = {"seed": 0, "batch": {"global_size": 32}}
    Tracker.open(tmp_path / "run", config, main=True, wandb_mode="disabled").close()
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == config


def test_values_that_are_not_finite_are_null(tmp_path):
    with opened(tmp_path) as tracker:
        tracker.log_train(step=1, **{**TRAIN, "loss": float("nan"), "grad_norm": float("inf")})
    (event,) = events(tmp_path)
    assert event["loss"] is None
    assert event["grad_norm"] is None
    assert event["pooled_dice"] == 0.25


def test_each_event_is_on_disk_when_the_call_returns(tmp_path):
    tracker = opened(tmp_path)
    for step in (1, 2, 3):
        tracker.log_train(step=step, **TRAIN)
        assert [event["step"] for event in events(tmp_path)] == list(range(1, step + 1))
    tracker.close()


def test_other_ranks_write_and_print_nothing(tmp_path):
    with opened(tmp_path / "run", main=False, wandb_mode="offline") as tracker:
        tracker.truncate_after(0)
        tracker.log_train(step=1, **TRAIN)
        tracker.log_evaluation(step=1, split="val", **SCORES)
        tracker.note("hello")
    assert not (tmp_path / "run").exists()
    assert printed(tracker) == ""


def test_a_resumed_run_appends_where_its_checkpoint_was(tmp_path):
    with opened(tmp_path) as tracker:
        for step in (1, 2, 3, 4):
            tracker.log_train(step=step, **TRAIN)
        tracker.log_evaluation(step=4, split="val", **SCORES)
    with opened(tmp_path) as tracker:
        tracker.truncate_after(2)
        tracker.log_train(step=3, **{**TRAIN, "loss": 0.125})
    assert [(event["step"], event["loss"]) for event in events(tmp_path)] == [(1, 0.5), (2, 0.5), (3, 0.125)]
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")], "a temporary file is left"


def test_a_line_cut_by_a_kill_is_dropped_and_a_damaged_one_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "train", "step": 1}\n{"event": "train", "st')
    with opened(tmp_path) as tracker:
        tracker.truncate_after(1)
    assert events(tmp_path) == [{"event": "train", "step": 1}]
    path.write_text('{"event": "tr\n{"event": "train", "step": 2}\n')
    with opened(tmp_path) as tracker, pytest.raises(TrainingError, match=r"metrics\.jsonl: not an event"):
        tracker.truncate_after(2)
    assert path.read_text().startswith('{"event": "tr\n')


def test_a_closed_tracker_refuses_events(tmp_path):
    tracker = opened(tmp_path)
    tracker.close()
    tracker.close()
    with pytest.raises(ValueError, match="closed"):
        tracker.log_train(step=1, **TRAIN)


def test_plain_lines_without_a_terminal_and_a_bar_with_one(tmp_path):
    with opened(tmp_path / "plain") as plain:
        plain.log_train(step=7, **TRAIN)
        plain.note("[not markup] " + "x" * 120)
    first, second = printed(plain).splitlines()
    assert first.startswith("step 7/10  epoch 0  loss 0.5000  pooled dice 0.2500")
    assert second == "[not markup] " + "x" * 120
    with opened(tmp_path / "bar", terminal=True) as bar:
        bar.log_train(step=7, **TRAIN)
    assert "7/10" in printed(bar)
    assert "loss 0.5000" in printed(bar)


@pytest.fixture
def without_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """wandb as on a machine where nobody has logged in."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    yield
    wandb.teardown()


@pytest.mark.usefixtures("without_login")
def test_wandb_is_offline_until_told_otherwise(monkeypatch):
    assert resolve_wandb_mode()[0] == "offline"
    assert resolve_wandb_mode("disabled")[0] == "disabled"
    monkeypatch.setenv("WANDB_MODE", "online")
    assert resolve_wandb_mode()[0] == "offline", "online without a login would ask on the terminal"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert resolve_wandb_mode()[0] == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolve_wandb_mode()[0] == "disabled"


@pytest.mark.usefixtures("without_login")
def test_offline_runs_of_one_folder_share_an_id(tmp_path):
    run = tmp_path / "run"
    for step in (1, 2):
        with opened(run, wandb_mode="offline") as tracker:
            tracker.log_train(step=step, **TRAIN)
            tracker.log_evaluation(step=step, split="val", **SCORES)
        assert "wandb: offline" in printed(tracker)
    identity = (run / "wandb-id").read_text().strip()
    assert {path.name for path in run.glob("wandb/offline-run-*/*.wandb")} == {f"run-{identity}.wandb"}


@pytest.mark.usefixtures("without_login")
@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_failure_of_wandb_is_said_once_and_training_goes_on(tmp_path, monkeypatch, broken):
    def fail(*args, **kwargs):
        raise wandb.Error("the dashboard\nis down")

    monkeypatch.setattr(wandb if broken == "init" else wandb.Run, broken, fail)
    with opened(tmp_path, wandb_mode="offline") as tracker:
        tracker.log_train(step=1, **TRAIN)
        tracker.log_train(step=2, **TRAIN)
    assert [event["step"] for event in events(tmp_path)] == [1, 2]
    said = [line for line in printed(tracker).splitlines() if "the dashboard is down" in line]
    assert len(said) == 1


def test_importing_brings_in_neither_wandb_nor_torch():
    code = "import sys, isicdist.training.tracking; print([m for m in ('wandb', 'torch') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
