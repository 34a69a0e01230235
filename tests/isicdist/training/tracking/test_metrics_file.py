"""metrics.jsonl: the exact bytes, what a kill leaves, and what is read back."""

from __future__ import annotations

import errno
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from isicdist.errors import CheckpointError, TrainingError
from isicdist.run_folder import METRICS_NAME
from isicdist.training.tracking import EvaluationMetrics, read_metrics
from isicdist.training.tracking.metrics_file import MetricsFile


def test_lines_have_the_keys_of_the_format_in_order(tmp_path, train_metrics, scores):
    file = MetricsFile(tmp_path)
    file.log_train(train_metrics)
    file.log_evaluation(scores)
    file.close("finished")
    assert (tmp_path / METRICS_NAME).read_text() == (
        '{"event": "train", "step": 1, "epoch": 0, "samples": 32, "loss": 0.5, "pooled_dice": 0.25, "lr": 0.001, '
        '"grad_norm": 1.5, "images_per_s": 17.0, "data_wait": 0.01, "skipped": 0, '
        '"memory_bytes": 2000000000}\n'
        '{"event": "evaluate", "step": 1, "split": "val", "n": 3, "mean_dice": 0.8, "pooled_dice": 0.7, '
        '"mean_jaccard": 0.6, "thresholded_jaccard": 0.5}\n'
    )


def test_values_that_are_not_finite_are_null(tmp_path, train_metrics):
    file = MetricsFile(tmp_path)
    file.log_train(replace(train_metrics, loss=math.nan, grad_norm=math.inf))
    file.close("finished")
    event = json.loads((tmp_path / METRICS_NAME).read_text())
    assert (event["loss"], event["grad_norm"], event["pooled_dice"]) == (None, None, 0.25)
    (read,), _ = read_metrics(tmp_path / METRICS_NAME)
    assert math.isnan(read.loss)
    assert replace(read, loss=0.5, grad_norm=1.5) == train_metrics


def test_each_event_is_in_the_file_when_the_call_returns(tmp_path, train_metrics):
    file = MetricsFile(tmp_path)
    for step in (1, 2, 3):
        file.log_train(replace(train_metrics, step=step))
        train, _ = read_metrics(tmp_path / METRICS_NAME)
        assert [event.step for event in train] == list(range(1, step + 1))
    file.close("finished")


def test_truncation_leaves_no_other_file(tmp_path, train_metrics):
    file = MetricsFile(tmp_path)
    for step in (1, 2):
        file.log_train(replace(train_metrics, step=step))
    file.truncate_after(1)
    file.close("finished")
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_NAME]
    assert len(read_metrics(tmp_path / METRICS_NAME)[0]) == 1


def test_an_evaluation_that_is_made_up_for_is_dropped(tmp_path, train_metrics):
    file, scores = MetricsFile(tmp_path), dict.fromkeys(("mean_dice", "pooled_dice", "mean_jaccard"), 0.5)
    for step in (1, 2):
        file.log_train(replace(train_metrics, step=step))
        file.log_evaluation(EvaluationMetrics(step=step, split="val", n=4, thresholded_jaccard=0.5, **scores))
    file.truncate_after(2, evaluated=False)
    file.close("finished")
    train, evaluations = read_metrics(tmp_path / METRICS_NAME)
    assert ([each.step for each in train], [each.step for each in evaluations]) == ([1, 2], [1])


def test_a_line_cut_by_a_kill_is_dropped_and_a_damaged_one_is_named(tmp_path):
    path = tmp_path / METRICS_NAME
    path.write_text('{"event": "train", "step": 1}\n{"event": "train", "st')
    file = MetricsFile(tmp_path)
    file.truncate_after(1)
    assert path.read_text() == '{"event": "train", "step": 1}\n'
    path.write_text('{"event": "tr\n{"event": "train", "step": 2}\n')
    with pytest.raises(TrainingError, match=r"metrics\.jsonl: not an event"):
        file.truncate_after(2)
    file.close("failed")
    assert path.read_text().startswith('{"event": "tr\n')


def test_a_full_disk_names_the_file(train_metrics, tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    (tmp_path / METRICS_NAME).symlink_to("/dev/full")
    file = MetricsFile(tmp_path)
    with pytest.raises(OSError) as raised:  # noqa: PT011
        file.log_train(train_metrics)
    assert raised.value.errno == errno.ENOSPC
    file.close("failed")


def test_reading_ignores_other_events_and_a_cut_line(tmp_path, train_metrics, scores):
    old = {name: value for name, value in train_metrics.to_json().items() if name != "skipped"}
    lines = [json.dumps(each) for each in ({"event": "later"}, old, scores.to_json())]
    path = tmp_path / METRICS_NAME
    path.write_text("\n".join([*lines, '{"event": "tra']))
    assert read_metrics(path) == ([train_metrics], [scores])


@pytest.mark.parametrize("line", ["{", "[1]", "{}", '{"event": "train", "step": 1}'])
def test_reading_names_a_damaged_line(tmp_path, line):
    path = tmp_path / METRICS_NAME
    path.write_text(f"{line}\n")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: damaged, not an event"):
        read_metrics(path)
