"""How often each fault is tried, and the table of what was tried and lost that `make test-faults` prints."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import ROOT

WORKER = Path(__file__).parent / "faulty_worker.py"
Launch = Callable[..., subprocess.Popen[bytes]]
Tally = Callable[[str, int], None]
FULL = os.environ.get("FAULTS") == "full"
"""Set by `make test-faults`; `make test` has a short form of each row."""


full_only = pytest.mark.skipif(not FULL, reason="make test-faults")
root_only = pytest.mark.skipif(not FULL or os.getuid() != 0, reason="make test-faults, as root: it mounts and limits")


def times(full: int, short: int) -> int:
    """Choose how often a fault is tried."""
    return full if FULL else short


SCENES = {
    "test_ranks": "one rank: out of memory, NaN, hang, launcher gone",
    "test_signals": "SIGTERM, SIGUSR1, SIGINT: one process, one rank, launcher, repeated, in an evaluation",
    "test_remote": "HTTP: changed content, dead and silent servers, nginx",
}
"""Rows of the table for the tests that try one thing each, by module."""


@pytest.fixture
def tally(record_property: Callable[[str, object], None]) -> Tally:
    """Count for the table: what was tried, and how often. A test that fails has lost something."""

    def count(what: str, tried: int) -> None:
        record_property("fault", [what, tried])

    return count


@pytest.fixture
def launched(shard_set: Path, tmp_path: Path) -> Iterator[Launch]:
    """Start `faulty_worker` FAULT FIRST LAST train WORDS on two processes under a launcher; LAST is optional.

    What it says goes to `tmp_path / "said"`; whatever is left at the end is killed.
    """
    started: list[subprocess.Popen[bytes]] = []

    def launch(fault: str, first: int, *words: object, last: int = 999) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
        command += ["--num_processes", "2", "--main_process_port", "0", "--mixed_precision", "no", str(WORKER)]
        command += [fault, str(first), str(last), "train", "--data", str(shard_set), "--run", str(tmp_path / "run")]
        env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        with (tmp_path / "said").open("w") as said:
            command += map(str, words)
            started.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=said, stderr=said))
        return started[0]

    yield launch
    for process in started:
        kill_with_ranks(process)


def kill_with_ranks(launcher: subprocess.Popen[Any]) -> None:
    """End a launcher, or a command without one, and what it has started."""
    ranks = psutil.Process(launcher.pid).children(recursive=True) if launcher.poll() is None else []
    for each in (launcher, *ranks):  # a rank has a session of its own, and one that hangs outlives its launcher
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    launcher.wait()


def both_ranks(launcher: subprocess.Popen[bytes], seconds: float = 60) -> list[psutil.Process]:
    """Wait until a launcher has started two ranks; returns them by rank."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(psutil.NoSuchProcess):
            by_rank = {each.environ().get("RANK"): each for each in psutil.Process(launcher.pid).children()}
            if by_rank.keys() == {"0", "1"}:
                return [by_rank["0"], by_rank["1"]]
        time.sleep(0.05)
    raise AssertionError("the launcher has started no two ranks")


def wait_for(what: str, said: Path, seconds: float = 90) -> str:
    """Wait until the file `said` has a match of the pattern `what`; returns its text."""
    end = time.monotonic() + seconds
    while not re.search(what, text := said.read_text()):
        assert time.monotonic() < end, text
        time.sleep(0.05)
    return text


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table, of all processes that the tests ran in."""
    tried: dict[str, int] = {}
    failed: dict[str, int] = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            counted = [value for name, value in report.user_properties if name == "fault"]
            scene = SCENES.get(Path(report.fspath).stem)
            for what, number in counted or ([(scene, 1)] if scene else []):  # pyright: ignore[reportGeneralTypeIssues]
                tried[what] = tried.get(what, 0) + number
                failed[what] = failed.get(what, 0) + (outcome == "failed")
    if not tried:
        return
    terminalreporter.section("what was tried, how often, what was lost")
    width = max(map(len, tried))
    for what in sorted(tried):
        lost = f"{failed[what]} tests failed" if failed[what] else "nothing"
        terminalreporter.write_line(f"{what:{width}}  {tried[what]:6d}  {lost}")
