"""A long run, with many epochs, evaluations and checkpoints: memory, files, threads and the cost of a step stay."""

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
import torch

from isicdist.network.unet import ImprovedUNet
from tests.conftest import ROOT
from tests.faults.conftest import FULL, Tally

pytestmark = pytest.mark.skipif(not FULL, reason="make test-faults")

STEPS = 2_000


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What all ranks together have, once so many steps were logged."""

    step: int
    memory: int
    files: int
    threads: int
    seconds: float
    """CPU time since the start."""
    pace: float
    """CPU time of one forward pass here and now, in seconds: what the machine's own speed is measured by."""


def usage(launcher: psutil.Process, step: int, pace: float) -> Usage | None:
    """Measure the ranks; None once they end."""
    try:
        ranks = launcher.children(recursive=True)
        return Usage(
            step=step,
            memory=sum(rank.memory_full_info().uss for rank in ranks),
            files=sum(rank.num_fds() for rank in ranks),
            threads=sum(rank.num_threads() for rank in ranks),
            seconds=sum(sum(rank.cpu_times()[:2]) for rank in ranks),
            pace=pace,
        )
    except psutil.Error:
        return None


def forward_seconds(network: ImprovedUNet, image: torch.Tensor) -> float:
    """Measure the CPU time of one forward pass."""
    start = time.thread_time()
    with torch.inference_mode():
        network(image)
    return time.thread_time() - start


def cost_of_step(usages: list[Usage]) -> float:
    """Compute the CPU time of a step, its part of the evaluations and checkpoints included, in forward passes.

    Wall time, and CPU time in seconds, change by half with what else runs on the machine; their ratio hardly does.
    """
    seconds = (usages[-1].seconds - usages[0].seconds) / (usages[-1].step - usages[0].step)
    return seconds / statistics.median(each.pace for each in usages)


def test_two_thousand_steps_on_two_processes_grow_nothing(shard_set: Path, tmp_path: Path, tally: Tally):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    command += ["--num_processes", "2", "--main_process_port", "0", "--mixed_precision", "no", "-m", "isicdist"]
    command += ["train", "--data", str(shard_set), "--run", str(run), "--steps", str(STEPS), "--epochs", "1000"]
    command += ["--batch.global-size", "4", "--model.base-channels", "2", "--log-every", "10", "--eval-every", "100"]
    command += ["--checkpoint-every", "50", "--tracker", "none"]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    seen: list[Usage] = []
    network, image = ImprovedUNet(base_channels=2).eval(), torch.zeros(1, 3, 64, 64)
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=said, stderr=said)
        try:
            launcher, metrics = psutil.Process(process.pid), run / "metrics.jsonl"
            while process.poll() is None:
                step = 10 * metrics.read_text().count('"train"') if metrics.exists() else 0
                if step and (measured := usage(launcher, step, forward_seconds(network, image))):
                    seen.append(measured)
                time.sleep(0.5)
        finally:
            process.kill()
    assert process.returncode == 0, (tmp_path / "said").read_text()

    def during(first: float, last: float) -> list[Usage]:
        return [each for each in seen if first * STEPS <= each.step < last * STEPS]

    early, late = during(0.1, 0.3), during(0.8, 0.98)
    assert len(early) > 5
    assert len(late) > 5

    def usual(usages: list[Usage], what: str) -> float:
        # The median: at a given moment an evaluation or a checkpoint may have files and threads of its own.
        return statistics.median(getattr(each, what) for each in usages)

    grown = usual(late, "memory") / usual(early, "memory")
    assert grown < 1.03, f"memory grew to {grown:.3f} of what it was"
    assert usual(late, "files") <= usual(early, "files")
    assert usual(late, "threads") <= usual(early, "threads")
    cost = cost_of_step(during(0.9, 1)) / cost_of_step(during(0.05, 0.15))
    print(f"soak: memory {grown:.3f}, cost of a step {cost:.3f} of the beginning")
    assert cost < 1.05
    tally("soak: steps on 2 processes; memory, open files, threads, cost of a step", STEPS)
