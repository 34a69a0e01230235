"""A signal to the launcher of two ranks, to one rank or to all, at any moment: both stop at one step, and are gone."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from isicdist.training.checkpoint import newest
from tests.faults.conftest import FULL, Launch, Tally, both_ranks, wait_for

pytestmark = pytest.mark.skipif(not FULL, reason="make test-faults; test_signals.py has a short form")

WORDS = ("--epochs", 400, "--batch.global-size", 6, "--model.base-channels", 4, "--log-every", 1)
WORDS += ("--checkpoint-every", 1, "--eval-every", 2)
ORPHAN_SECONDS = 5


def sent_to(target: str, launcher: psutil.Process, ranks: list[psutil.Process]) -> list[psutil.Process]:
    """List the processes that get the signal, in order."""
    everyone = [launcher, *ranks]
    return {"the launcher": [launcher], "one rank": ranks[1:], "all, twice": [*everyone, *everyone]}[target]


def alive(process: psutil.Process) -> bool:
    """Tell whether a process runs; one that waits for init to read its exit code does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("target", ["the launcher", "one rank", "all, twice"])
@pytest.mark.parametrize(("moment", "call"), [("start", 1), ("step", 1), ("evaluation", 1), ("save", 1)])
def test_signals_stop_all_ranks_at_one_step_or_before_the_first(
    launched: Launch, tmp_path: Path, number: signal.Signals, target: str, moment: str, call: int, tally: Tally
):
    said, run = tmp_path / "said", tmp_path / "run"
    process = launched(f"pause@{moment}", call, *WORDS, last=call)
    launcher, ranks = psutil.Process(process.pid), both_ranks(process)
    wait_for("here comes the fault", said)
    for each in sent_to(target, launcher, ranks):
        with contextlib.suppress(psutil.NoSuchProcess):
            each.send_signal(number)
        time.sleep(0.1)
    process.wait(timeout=30)
    assert process.returncode
    end = time.monotonic() + ORPHAN_SECONDS
    while orphans := [rank for rank in ranks if alive(rank)]:
        assert time.monotonic() < end, f"{orphans} {said.read_text()}"
        time.sleep(0.05)
    stopped = re.findall(r"rank (\d): stopped by a signal after step (\d+)", said.read_text())
    if moment == "start":
        assert not (run / "metrics.jsonl").exists()
        assert not (run / "checkpoints").exists()
    else:
        assert {rank for rank, _ in stopped} == {"0", "1"}, said.read_text()
        (step,) = {int(step) for _, step in stopped}
        checkpoint = newest(run, warn=pytest.fail)
        assert checkpoint
        assert checkpoint.state["step"] == step
        assert (run / "REQUEUE").exists()
        logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in logged if line["event"] == "train"] == list(range(1, step + 1))
    tally("SIGTERM, SIGUSR1, SIGINT: launcher, one rank, all twice; start-up, step, evaluation, save", 1)
