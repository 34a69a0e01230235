"""Progress: lines in a log file, a bar on a terminal."""

from __future__ import annotations

import io
import sys

import pytest

from shards import progress


def test_progress_in_a_log_is_a_plain_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.progress("packing", "pairs") as report:
        for done in range(121):
            now = 100.0 + done / 4
            report(done, 120)
    assert capsys.readouterr().err.splitlines() == [
        "packing: 40 of 120 pairs, 4.0/s",
        "packing: 80 of 120 pairs, 4.0/s",
        "packing: 120 of 120 pairs, 4.0/s",
    ]


def test_progress_on_a_terminal_shows_rate_and_time_left(monkeypatch: pytest.MonkeyPatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress.progress("packing", "pairs") as report:
        report(0, 120, "comparing")
        report(60, 120, "comparing")
    shown = terminal.getvalue()
    assert "comparing" in shown
    assert "60/120" in shown
    assert "pairs/s" in shown
