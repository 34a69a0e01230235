"""Submit launch/slurm.sbatch to a real SLURM: two nodes, the time limit, scancel."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster import slurm as scheduler
from tests.cluster.hosts import ROOT, wait_for
from tests.cluster.slurm import Slurm, slurm

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
STEPS = 1500  # more than a minute
WORDS = (
    "--batch.global-size",
    6,
    "--model.base-channels",
    4,
    "--log-every",
    1,
    "--checkpoint-every",
    50,
    "--eval-every",
    500,
)


@pytest.fixture
def queue(cluster, tmp_path) -> Iterator[Slurm]:
    if reason := scheduler.why_not():
        pytest.skip(reason)
    *nodes, controller = cluster
    with slurm(tmp_path / "slurm", nodes, controller) as running:
        yield running


@pytest.fixture
def folder(tmp_path) -> Path:
    """A user's folder with a copy of the launch files, in float32: a CPU may compute bf16 in either precision."""
    shutil.copytree(ROOT / "launch", tmp_path / "mine" / "launch")
    file = tmp_path / "mine" / "launch" / "multinode.yaml"
    file.write_text(re.sub("mixed_precision: bf16", "mixed_precision: 'no'", file.read_text()))
    return tmp_path / "mine"


def submit(queue: Slurm, folder: Path, run: Path, nodes: int, data: Path, *words: object) -> int:
    flags = ("--chdir", folder, "--output", folder / "job.log", "--nodes", nodes, "--gpus-per-node", 1)
    limit = ("--cpus-per-task", 2, "--time", "00:01:00", "--signal", "USR1@50")
    return queue.submit(*flags, *limit, folder / "launch" / "slurm.sbatch", run, "--data", data, *WORDS, *words)


def losses(run: Path) -> list[tuple[int, float]]:
    events = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(event["step"], event["loss"]) for event in events if event["event"] == "train"]


def training_processes(run: Path) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if {"train", str(run)} <= set(process.info["cmdline"] or ()) and "python" in process.name()
    ]


def test_a_job_goes_on_after_its_time_limit_as_if_it_had_none(queue, folder, shard_set, python, tmp_path):
    """The limit is a minute and the signal comes up to 50 s before it, so the job is queued again until it is done."""
    job = submit(queue, folder, tmp_path / "run", 2, shard_set, "--epochs", 9999, "--steps", STEPS)
    state = queue.wait(job, 400)
    log = (folder / "job.log").read_text()
    assert state == "COMPLETED", log
    shown = queue.command("scontrol", "show", "job", job)
    restarts = re.search(r"Restarts=(\d+)", shown)
    assert restarts
    assert int(restarts[1]) >= 1, shown
    assert "stopped by a signal" in log
    assert not (tmp_path / "run" / "REQUEUE").exists()

    words = (
        "-m",
        "isicdist",
        "train",
        "--data",
        shard_set,
        "--run",
        tmp_path / "whole",
        "--epochs",
        9999,
        "--steps",
        STEPS,
        *WORDS,
    )
    done = python(*words, processes=2)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_cancelled_job_leaves_no_process_and_had_the_cores_it_asked_for(queue, folder, shard_set, tmp_path):
    job = submit(queue, folder, tmp_path / "run", 1, shard_set, "--epochs", 9999)
    wait_for("step 3", folder / "job.log")
    ranks = training_processes(tmp_path / "run")
    assert ranks
    assert {len(process.cpu_affinity() or ()) for process in ranks} == {min(2, psutil.cpu_count() or 1)}
    queue.command("scancel", job)
    assert queue.wait(job, 60) == "CANCELLED"
    end = time.monotonic() + 30
    while training_processes(tmp_path / "run"):
        assert time.monotonic() < end
        time.sleep(0.2)


def test_slurm_accepts_the_job_files(queue, folder):
    for file in (folder / "launch").glob("*.sbatch"):
        words = ("sbatch", "--test-only", "--nodes=1", "--gpus-per-node=1", "--cpus-per-task=1", file, "run")
        done = subprocess.run(
            queue.controller.command(*words), env=queue.controller.environment(queue.environment), text=True,
            capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
