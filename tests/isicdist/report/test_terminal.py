"""Report on the console: a table of scores for each run."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from isicdist.errors import CheckpointError
from isicdist.evaluate import evaluate
from isicdist.report import report
from isicdist.training.tracking import Tracker
from shards.errors import UsageError

QUIET = Console(quiet=True)


def shown(run: Path, width: int = 80) -> str:
    text = io.StringIO()
    report([run], Console(file=text, width=width))
    return text.getvalue()


def test_an_ascii_terminal_gets_ascii(run):
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    report([run], Console(file=file, width=80))
    file.seek(0)
    assert file.read().startswith("step 3, epoch 0, 48 samples, 2 processes")


def test_the_table_has_a_line_for_each_threshold_and_resolution(run, shard_set):
    assert "best model: step 2\n" in shown(run)  # nothing is evaluated yet
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


def test_an_evaluation_of_an_earlier_model_is_pointed_out(run, shard_set):
    evaluate(run, str(shard_set), "test")
    assert "evaluate it again" not in shown(run)
    path = run / "evaluation" / "test" / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_step": 1}))
    assert "test was evaluated at step 1: evaluate it again" in shown(run)
    path.write_text("{}")
    with pytest.raises(CheckpointError, match=r"summary\.json: missing or damaged; evaluate the split again"):
        shown(run)


def test_a_report_of_no_run_or_an_empty_one_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="not a run"):
        report([tmp_path], QUIET)
    with Tracker.open(tmp_path, {}, main=True, total_steps=3):
        pass
    with pytest.raises(CheckpointError, match="nothing is logged in it yet"):
        report([tmp_path], QUIET)


def test_several_runs_are_shown_one_after_the_other(run, make_run):
    other = make_run(run.parent / "other", world_size=5)
    text = io.StringIO()
    report([run, other], Console(file=text, width=80))
    lines = text.getvalue().splitlines()
    titles = [line.strip("─ ") for line in lines if line.startswith("─") and line.strip("─ ")]
    assert titles == ["run", "other"]
    assert "2 processes" in lines[1]
    assert sum("5 processes" in line for line in lines) == 1


def test_no_run_and_one_that_is_named_twice_are_refused(run):
    with pytest.raises(UsageError, match="name at least one run"):
        report([], QUIET)
    with pytest.raises(UsageError, match="named twice"):
        report([run, run / ".." / "run"], QUIET)
