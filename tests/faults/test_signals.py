"""A signal on one rank stops all of them at one step, with a checkpoint from which the run goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.conftest import full_only, kill_with_ranks

ROOT = Path(__file__).parent.parent.parent
WORDS = ("--epochs", "400", "--batch.global-size", "6", "--model.base-channels", "4", "--log-every", "1")


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[[list[str]], subprocess.Popen[str]]]:
    """Start a command that trains into `tmp_path / "run"`, and wait until it has made a few steps."""
    processes: list[subprocess.Popen[str]] = []

    def start(command: list[str]) -> subprocess.Popen[str]:
        env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
        pipes: dict[str, Any] = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **pipes)
        processes.append(process)
        metrics = tmp_path / "run" / "metrics.jsonl"
        give_up = time.monotonic() + 90
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 4):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < give_up
            time.sleep(0.1)
        return process

    yield start
    for process in processes:
        with process:  # closes the pipes
            kill_with_ranks(process)


def last_checkpoint(run: Path) -> int:
    return max(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


@full_only
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_one_process_saves_and_exits_85(shard_set, tmp_path, started, number):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "isicdist", "train", "--data", str(shard_set), "--run", str(run), *WORDS]
    process = started(command)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 85, errors
    said = re.search(r"error: stopped by a signal after step (\d+)", errors)
    assert said
    assert last_checkpoint(run) == int(said[1])
    assert (run / "REQUEUE").exists()


@full_only
def test_ctrl_c_under_the_launcher_of_one_process_saves_although_the_launcher_goes_first(shard_set, tmp_path, started):
    run = tmp_path / "run"
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    train = ("-m", "isicdist", "train", "--data", str(shard_set), "--run", str(run), *WORDS)
    process = started([sys.executable, *launch, *train])
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=60)  # until the last process has closed the pipe
    said = re.search(r"error: stopped by a signal after step (\d+)", errors)
    assert said, errors
    assert last_checkpoint(run) == int(said[1])
    assert (run / "REQUEUE").exists()


@full_only
def test_a_signal_that_is_repeated_at_once_is_one_and_a_later_one_means_now(shard_set, tmp_path, started):
    """Also in the middle of a step that takes for ever."""
    run = tmp_path / "run"
    worker = [sys.executable, str(Path(__file__).parent / "faulty_worker.py"), "hang", "5", "5"]
    process = started([*worker, "train", "--data", str(shard_set), "--run", str(run), *WORDS])
    time.sleep(0.5)
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
        process.send_signal(number)
        time.sleep(0.1)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1.5)  # longer than the worker's StopSignal.REPEAT_SECONDS
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGTERM


def test_a_signal_on_one_of_two_ranks_stops_both_and_the_run_goes_on(shard_set, tmp_path, started, python):
    run = tmp_path / "run"
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", "2"]
    launch += ["--main_process_port", "0", "--mixed_precision", "no"]
    train = ("-m", "isicdist", "train", "--data", str(shard_set), "--run", str(run), *WORDS)
    process = started([sys.executable, *launch, *train])
    max(psutil.Process(process.pid).children(), key=lambda rank: rank.pid).send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=60)
    steps = set(re.findall(r"rank \d: stopped by a signal after step (\d+)", errors))
    assert steps == {str(last_checkpoint(run))}, errors
    assert (run / "REQUEUE").exists()

    step = last_checkpoint(run)
    again = python(*train, "--steps", step + 2)
    assert again.returncode == 0, again.stderr
    assert f"resumed from step-{step:08d}" in again.stdout
    logged = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines() if "train" in line]
    assert logged == list(range(1, step + 3))  # no step twice, none left out
    assert not (run / "REQUEUE").exists()


@pytest.mark.slow
def test_max_restarts_restarts_no_run_that_a_signal_has_stopped(shard_set, tmp_path, started):
    run = tmp_path / "run"
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", "2"]
    launch += ["--main_process_port", "0", "--mixed_precision", "no", "--max_restarts", "1", "--monitor_interval", "1"]
    train = ("-m", "isicdist", "train", "--data", str(shard_set), "--run", str(run), *WORDS)
    process = started([sys.executable, *launch, *train])
    max(psutil.Process(process.pid).children(), key=lambda rank: rank.pid).send_signal(signal.SIGUSR1)
    output, errors = process.communicate(timeout=90)
    assert set(re.findall(r"rank (\d): .*: stopped by a signal in this launch", errors)) == {"0", "1"}, errors
    assert "resumed from" not in output
    assert (run / "REQUEUE").exists()


TOLD_WHILE_IT_EVALUATES = """
import os, signal, sys
import isicdist.train
from isicdist.cli import main

def told(*words, **more):
    isicdist.train.validate = validate
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return validate(*words, **more)

validate, isicdist.train.validate = isicdist.train.validate, told
main(sys.argv[1:])
"""


def test_an_evaluation_that_a_signal_cuts_short_is_made_up_for(shard_set, tmp_path, python):
    runs, script = (tmp_path / "whole", tmp_path / "cut"), tmp_path / "told.py"
    script.write_text(TOLD_WHILE_IT_EVALUATES)
    train = ("train", "--data", shard_set, "--steps", 4, "--eval-every", 2, *WORDS)
    assert python("-m", "isicdist", *train, "--run", runs[0]).returncode == 0
    stopped = python(script, *train, "--run", runs[1], processes=2, env={"PYTHONPATH": str(ROOT)})
    assert set(re.findall(r"rank \d: stopped by a signal after step (\d+)", stopped.stderr)) == {"2"}, stopped.stderr
    assert not (runs[1] / "best").exists()
    again = python("-m", "isicdist", *train, "--run", runs[1])
    assert again.returncode == 0, again.stderr
    events = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    steps = [[(line["event"], line["step"]) for line in of_run] for of_run in events]
    assert steps[0] == steps[1]
    assert json.loads((runs[1] / "best" / "model.json").read_text())["step"] in (2, 4)
