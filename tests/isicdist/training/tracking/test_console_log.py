"""The console: lines in a log file, a progress bar on a terminal."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from isicdist.training.tracking.console_log import ConsoleLog


def opened(*, terminal: bool) -> tuple[ConsoleLog, io.StringIO]:
    text = io.StringIO()
    log = ConsoleLog(Console(file=text, force_terminal=terminal, width=100), total_steps=10)
    log.start_progress()
    return log, text


def test_plain_lines_without_a_terminal(train_metrics, scores):
    log, text = opened(terminal=False)
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


def test_a_progress_bar_on_a_terminal(train_metrics):
    log, text = opened(terminal=True)
    log.truncate_after(4)
    assert "4/10" in text.getvalue()
    log.log_train(replace(train_metrics, step=7))
    log.close("finished")
    log.close("failed")
    assert "7/10" in text.getvalue()
    assert "loss 0.5000" in text.getvalue()


def test_skipped_updates_have_a_line_of_their_own(train_metrics):
    for terminal in (False, True):
        log, text = opened(terminal=terminal)
        log.log_train(replace(train_metrics, skipped=2))
        log.close("finished")
        assert "step 1: 2 updates were skipped: loss or gradient not finite" in text.getvalue()
