"""Lines in a log file: one for each interval of the log, in any encoding."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from isicdist.training.tracking import Tracker
from isicdist.training.tracking.console_log import ConsoleLog


def test_one_line_for_each_event(train_metrics, scores):
    text = io.StringIO()
    log = ConsoleLog(Console(file=text, width=100), total_steps=10)
    log.log_train(replace(train_metrics, step=7))
    log.log_evaluation(scores)
    log.note("[not markup] " + "x" * 120)
    log.close("finished")
    train, evaluation, note = text.getvalue().splitlines()
    assert train == (
        "step 7/10  epoch 0  loss 0.5000  pooled dice 0.2500  lr 1.00e-03  grad norm 1.5  17.0 images/s  wait 1%"
    )
    assert evaluation.startswith("step 1  val (3 images)  mean dice 0.8000  pooled dice 0.7000")
    assert note == "[not markup] " + "x" * 120


def test_skipped_updates_have_a_line_of_their_own(train_metrics):
    text = io.StringIO()
    ConsoleLog(Console(file=text), total_steps=10).log_train(replace(train_metrics, skipped=2))
    assert "step 1: 2 updates were skipped: loss or gradient not finite" in text.getvalue()


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_INTERACTIVE"])
def test_a_pipe_gets_no_control_characters_and_no_line_but_those_of_the_log(
    monkeypatch, tmp_path, capsys, train_metrics, scores, variable
):
    monkeypatch.setenv(variable, "1")
    with Tracker.open(tmp_path, {}, main=True, total_steps=10) as tracker:
        capsys.readouterr()
        for step in (2, 4, 6):
            tracker.log_train(replace(train_metrics, step=step))
            tracker.log_progress("val", step, 6)
        tracker.log_checkpoint(6)
        tracker.log_evaluation(scores)
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert [line[:9] for line in printed.splitlines()] == ["step 2/10", "step 4/10", "step 6/10", "step 1  v"]


def test_an_ascii_locale_prints_escapes_instead_of_failing():
    raw = io.BytesIO()
    log = ConsoleLog(Console(file=io.TextIOWrapper(raw, encoding="ascii", write_through=True)), total_steps=10)
    log.note("résumé")
    assert raw.getvalue() == b"r\\xe9sum\\xe9\n"
