"""A long run, with many epochs, evaluations and checkpoints: memory, files, threads and the work of a step stay."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT
from tests.faults.conftest import FULL, Tally

pytestmark = pytest.mark.skipif(not FULL, reason="make test-faults")

WORKER = Path(__file__).parent / "counting_worker.py"
STEPS = 2_000


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What all ranks together have, once so many steps were logged."""

    step: int
    memory: int
    files: int
    threads: int


def usage(launcher: psutil.Process, step: int) -> Usage | None:
    """Measure the ranks; None once they end."""
    try:
        ranks = launcher.children(recursive=True)
        return Usage(
            step=step,
            memory=sum(rank.memory_full_info().uss for rank in ranks),
            files=sum(rank.num_fds() for rank in ranks),
            threads=sum(rank.num_threads() for rank in ranks),
        )
    except psutil.Error:
        return None


def test_two_thousand_steps_on_two_processes_grow_nothing(shard_set: Path, tmp_path: Path, tally: Tally):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    command += ["--num_processes", "2", "--main_process_port", "0", "--mixed_precision", "no", str(WORKER)]
    command += [str(tmp_path), "train", "--data", str(shard_set), "--run", str(run), "--steps", str(STEPS)]
    command += ["--epochs", "1000", "--batch.global-size", "4", "--model.base-channels", "2", "--log-every", "10"]
    command += ["--eval-every", "100", "--checkpoint-every", "50", "--tracker", "none"]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    seen: list[Usage] = []
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=said, stderr=said)
        try:
            launcher, metrics = psutil.Process(process.pid), run / "metrics.jsonl"
            while process.poll() is None:
                step = 10 * metrics.read_text().count('"train"') if metrics.exists() else 0
                if step and (measured := usage(launcher, step)):
                    seen.append(measured)
                time.sleep(0.5)
        finally:
            process.kill()
    assert process.returncode == 0, (tmp_path / "said").read_text()

    def usual(what: str, first: float, last: float) -> float:
        # The median: at a given moment an evaluation or a checkpoint may have files and threads of its own.
        values = [getattr(each, what) for each in seen if first * STEPS <= each.step < last * STEPS]
        assert len(values) > 5
        return statistics.median(values)

    early, late = (0.1, 0.3), (0.8, 0.98)
    grown = usual("memory", *late) / usual("memory", *early)
    assert grown < 1.03, f"memory grew to {grown:.3f} of what it was"
    for what in ("files", "threads"):
        assert usual(what, *late) <= usual(what, *early), what
    for rank in (0, 1):
        lines = (tmp_path / f"rank-{rank}").read_text().splitlines()
        calls = {int(step): int(count) for step, count in map(str.split, lines)}
        first, last = calls[600] - calls[200], calls[STEPS] - calls[STEPS - 400]
        print(f"soak: rank {rank}: {first / 400:.0f} calls in a step, {last / first:.4f} of it at the end")
        assert last < 1.01 * first
    print(f"soak: memory {grown:.3f} of the beginning")
    tally("soak: steps on 2 processes; memory, open files, threads, calls of a step", STEPS)
