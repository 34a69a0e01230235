"""How often each fault is tried, and the table of what was tried and lost that `make test-faults` prints."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

Tally = Callable[[str, int], None]
FULL = os.environ.get("FAULTS") == "full"
"""Set by `make test-faults`; `make test` has a short form of each row."""


root_only = pytest.mark.skipif(not FULL or os.getuid() != 0, reason="make test-faults, as root: it mounts and limits")


def times(full: int, short: int) -> int:
    """Choose how often a fault is tried."""
    return full if FULL else short


SCENES = {
    "test_ranks": "one rank: out of memory, NaN, exception, SIGKILL, hang, launcher gone",
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
