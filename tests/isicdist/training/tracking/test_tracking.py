"""The tracker: fans events out to its sinks on the main process, and does nothing on the other ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from isicdist.training.tracking import Sink, Tracker


def test_a_run_is_logged_to_the_file_and_the_console(tmp_path, capsys, train_metrics, scores):
    config = {"seed": 0, "batch": {"global_size": 32}}
    with Tracker.open(tmp_path / "run", config, main=True, total_steps=10) as tracker:
        tracker.truncate_after(0)
        tracker.log_train(train_metrics)
        tracker.log_evaluation(scores)
        tracker.note("hello")
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == config
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["train", "evaluate"]
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["step", "step", "hello"]


def test_other_ranks_write_and_print_nothing(tmp_path, capsys, train_metrics, scores):
    with Tracker.open(tmp_path / "run", {}, main=False, total_steps=10) as tracker:
        tracker.truncate_after(0)
        tracker.log_train(train_metrics)
        tracker.log_evaluation(scores)
        tracker.note("hello")
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_a_resumed_run_appends_where_its_checkpoint_was(tmp_path, train_metrics, scores):
    with Tracker.open(tmp_path, {}, main=True, total_steps=10) as tracker:
        for step in (1, 2, 3, 4):
            tracker.log_train(replace(train_metrics, step=step))
        tracker.log_evaluation(replace(scores, step=4))
    with Tracker.open(tmp_path, {}, main=True, total_steps=10) as tracker:
        tracker.truncate_after(2)
        tracker.log_train(replace(train_metrics, step=3, loss=0.125))
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(event["step"], event["loss"]) for event in events] == [(1, 0.5), (2, 0.5), (3, 0.125)]


class Recorder(Sink):
    """Lists the names of the sinks that were closed, in order, and with which state."""

    def __init__(self, name: str, closed: list[tuple[str, str]]) -> None:
        self.name = name
        self.closed = closed

    def close(self, state: str) -> None:
        self.closed.append((self.name, state))


def test_sinks_are_closed_in_reverse_and_know_how_the_run_ended(train_metrics):
    closed: list[tuple[str, str]] = []
    sinks = [Recorder("file", closed), Recorder("console", closed)]
    with Tracker(sinks) as tracker:
        tracker.log_train(train_metrics)  # a sink without a use for it ignores it
    assert closed == [("console", "finished"), ("file", "finished")]
    closed.clear()
    with pytest.raises(ZeroDivisionError), Tracker(sinks):
        raise ZeroDivisionError
    assert closed == [("console", "failed"), ("file", "failed")]


def test_a_closed_tracker_refuses_events(tmp_path, train_metrics, scores):
    tracker = Tracker.open(tmp_path, {}, main=True, total_steps=10)
    tracker.close("stopped")
    tracker.close()
    with pytest.raises(ValueError, match="closed"):
        tracker.log_train(train_metrics)
    with pytest.raises(ValueError, match="closed"):
        tracker.log_evaluation(scores)


def test_importing_brings_in_neither_wandb_nor_torch():
    code = "import sys, isicdist.training.tracking; print([m for m in ('wandb', 'torch') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[4])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
