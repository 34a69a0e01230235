"""The live display of a terminal: its frames, what is printed above it, and the terminal that it leaves behind."""

from __future__ import annotations

import io
import logging
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from isicdist.run_folder import METRICS_NAME
from isicdist.training.tracking.live_display import LiveDisplay
from isicdist.training.tracking.metrics_file import MetricsFile
from shards.command_line import REDRAWN_ROWS, create_app, run_app
from shards.errors import ToolkitError


class Terminal(io.TextIOWrapper):
    """A terminal that keeps all that is written to it."""

    def __init__(self, encoding: str = "utf-8") -> None:
        self.raw = io.BytesIO()
        super().__init__(self.raw, encoding=encoding, write_through=True)

    def isatty(self) -> bool:
        return True

    @property
    def text(self) -> str:
        return self.raw.getvalue().decode(self.encoding)


def attach_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make stdout and stderr a terminal that can draw; not a fixture, as pytest sets both anew for each phase."""
    monkeypatch.setenv("TERM", "xterm")
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    return screen


def frame(display: LiveDisplay, width: int, encoding: str = "utf-8") -> list[str]:
    """Draw one frame as text."""
    screen = Terminal(encoding)
    Console(file=screen, width=width, force_terminal=False).print(display)
    return screen.text.splitlines()


def logged(train_metrics, scores, metrics_path: Path = Path("none")) -> LiveDisplay:
    """A run of 100 steps that evaluates its second model."""
    display = LiveDisplay(Console(width=80), total_steps=100, metrics_path=metrics_path)
    for step in range(2, 42, 2):
        display.log_train(replace(train_metrics, step=step, epoch=step // 10, loss=1 / step, pooled_dice=step / 100))
    display.log_evaluation(replace(scores, step=20, mean_dice=0.8))
    display.log_evaluation(replace(scores, step=30, mean_dice=0.75))
    display.log_checkpoint(40)
    display.log_progress("val", 64, 256)
    return display


@pytest.mark.parametrize("width", [80, 200])
def test_a_frame_shows_the_run_in_as_many_rows_at_any_width(train_metrics, scores, width):
    rows = frame(logged(train_metrics, scores), width)
    assert [row[:12].strip() for row in rows] == [
        "train",
        "loss",
        "train dice",
        "val dice",
        "evaluate val",
        "17.0 images/",
        "",
    ]
    assert "step 40/100  epoch 4  0:00:00 left" in rows[0]
    assert rows[1].rstrip().endswith("0.0250")
    assert rows[2].split()[2:] == ["▁▁▂▂▂▃▃▄▄▄▅▅▅▆▆▇▇▇██", "0.4000"]
    assert "█▁" in rows[3]
    assert rows[3].rstrip().endswith("0.7500  best 0.8000 at step 20")
    assert rows[4].rstrip().endswith("64/256 images")
    assert rows[5].rstrip() == "17.0 images/s   data wait 1%   memory 2.0 GB   checkpoint at step 40"
    assert max(map(len, rows)) <= width
    assert len(rows) <= REDRAWN_ROWS


def test_a_terminal_without_unicode_or_room_gets_ascii_that_is_cut(train_metrics, scores):
    display = logged(train_metrics, scores)
    assert frame(display, 80, "ascii")[2].split()[2:] == ["__...--~~~===++***##", "0.4000"]
    rows = frame(display, 24, "ascii")
    assert all(len(row) <= 24 and row.isascii() for row in rows)
    assert len(rows) <= REDRAWN_ROWS


def test_the_remaining_time_is_predicted_from_the_pace_and_counts_down(monkeypatch, train_metrics):
    clock = iter([0.0, 0.0, 10.0, 30.0, 35.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    display = LiveDisplay(Console(), total_steps=100, metrics_path=Path("none"))
    assert "0:00:00 elapsed" in frame(display, 100)[0]
    for step in (10, 20):  # 2 s a step
        display.log_train(replace(train_metrics, step=step))
    assert "0:02:35 left" in frame(display, 100)[0]


def test_a_resumed_run_shows_its_curves_from_the_start(tmp_path, train_metrics, scores):
    file = MetricsFile(tmp_path)
    file.log_train(replace(train_metrics, step=10))
    file.log_evaluation(replace(scores, step=10))
    file.close("stopped")
    display = LiveDisplay(Console(), total_steps=100, metrics_path=tmp_path / METRICS_NAME)
    display.truncate_after(10)
    rows = frame(display, 100)
    assert "step 10/100" in rows[0]
    assert "best 0.8000 at step 10" in rows[3]
    assert rows[4].rstrip().endswith("checkpoint at step 10")


def test_what_is_printed_meanwhile_is_whole_and_the_terminal_is_handed_back(monkeypatch, train_metrics):
    terminal = attach_terminal(monkeypatch)
    logger = logging.getLogger("a-library")
    logger.addHandler(handler := logging.StreamHandler(terminal))
    display = LiveDisplay(Console(width=80), total_steps=100, metrics_path=Path("none"))
    display.start()
    display.log_train(replace(train_metrics, step=50))
    display.note("a note")
    print("a print")
    print("a warning", file=sys.stderr)
    logger.warning("a log line")
    display.close("stopped")
    display.close("failed")
    lines = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]|\r(?!\n)", "", terminal.text).splitlines()
    assert {"a note", "a print", "a warning", "a log line"} <= set(lines)
    assert terminal.text.count("\x1b[?25l") == 1
    assert terminal.text.rindex("\x1b[?25h") > terminal.text.rindex("\x1b[?25l")
    assert (sys.stdout, sys.stderr, handler.stream) == (terminal, terminal, terminal)
    assert "step 50/100" in terminal.text
    logger.removeHandler(handler)


def test_stderr_that_is_a_file_keeps_its_lines(monkeypatch):
    attach_terminal(monkeypatch)
    errors = io.StringIO()
    monkeypatch.setattr(sys, "stderr", errors)
    display = LiveDisplay(Console(width=80), total_steps=100, metrics_path=Path("none"))
    display.start()
    print("a warning", file=sys.stderr)
    display.close("finished")
    assert errors.getvalue() == "a warning\n"


@pytest.mark.parametrize(("rank", "rows"), [("0", 0), ("1", REDRAWN_ROWS)])
def test_the_failure_of_another_rank_ends_in_more_rows_than_the_display_erases(monkeypatch, rank, rows):
    terminal = attach_terminal(monkeypatch)
    monkeypatch.setattr(sys, "__stderr__", terminal)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # restored after the test
    monkeypatch.setenv("PYTHON_COLORS", "0")  # Python 3.13 and newer
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    app = create_app(name="fails", help="")

    @app.default
    def fail() -> None:
        raise ToolkitError("a damaged shard")

    with pytest.raises(SystemExit, match="1"):
        run_app(app, [])
    assert terminal.text == f"error: rank {rank}: a damaged shard\n" + "\n" * rows
    sys.excepthook(ValueError, ValueError("a bug"), None)
    assert terminal.text.endswith("ValueError: a bug\n" + "\n" * rows)
