"""A run that is killed anywhere, inside a save too, and started again is the run that was never killed."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from tests.conftest import Command
from tests.faults.conftest import FULL, Tally

WORKER = Path(__file__).parent / "killed_worker.py"
WORDS = ("--steps", 6, "--epochs", 9, "--eval-every", 3, "--checkpoint-every", 2, "--keep", 1, "--log-every", 1)
WORDS += ("--batch.global-size", 6, "--model.base-channels", 2, "--optim.ema-decay", 0.9)


def train(python: Command, data: Path, run: Path, *fault: str, processes: int = 1) -> CompletedProcess[str]:
    """Train, with a fault of `killed_worker` or without."""
    program = (WORKER, *fault) if fault else ("-m", "isicdist")
    return python(*program, "train", "--data", data, "--run", run, *WORDS, processes=processes)


@pytest.fixture(scope="module")
def whole(python: Command, shard_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    done = train(python, shard_set, run)
    assert done.returncode == 0, done.stderr
    return run


def learnt(run: Path) -> tuple[list[dict], bytes, bytes, dict]:
    """What a run has measured, its weights and their average, and its optimizer."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timings = ("images_per_s", "data_wait", "memory_bytes")
    measured = [{name: value for name, value in line.items() if name not in timings} for line in lines]
    last = run / "checkpoints" / "step-00000006"
    weights, average = ((last / name).read_bytes() for name in ("model.safetensors", "ema.safetensors"))
    return measured, weights, average, torch.load(last / "optimizer.pt", weights_only=True)["state"]


def check_same(whole: Path, other: Path) -> None:
    """The same losses, scores, weights, optimizer and best model, bit for bit."""
    expected, found = learnt(whole), learnt(other)
    assert found[:3] == expected[:3]
    for parameter, state in expected[3].items():
        assert all(torch.equal(value, found[3][parameter][key]) for key, value in state.items())
    cards = [json.loads((run / "best" / "model.json").read_text()) for run in (whole, other)]
    assert cards[0] == cards[1]


@pytest.mark.parametrize("number", range(2, 52, 2) if FULL else (2, 11, 16, 22, 38))
def test_a_run_that_was_killed_equals_the_one_that_was_not(python, shard_set, whole, tmp_path, number, tally: Tally):
    killed = train(python, shard_set, tmp_path / "run", f"kill-{number}")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = train(python, shard_set, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    check_same(whole, tmp_path / "run")
    left = [path.name for folder in ("run", "run/checkpoints") for path in (tmp_path / folder).iterdir()]
    assert not [name for name in left if name.startswith(".")]
    tally("training: SIGKILL inside saves", 1)


def test_nothing_depends_on_the_global_generators(python, shard_set, whole, tmp_path, tally: Tally):
    done = train(python, shard_set, tmp_path / "run", "reseed")
    assert done.returncode == 0, done.stderr
    check_same(whole, tmp_path / "run")
    tally("training: global generators seeded anew", 1)


@pytest.mark.skipif(not FULL, reason="make test-faults")
@pytest.mark.parametrize("numbers", [(3, 11), (16, 22, 38)])
def test_two_processes_of_which_the_one_that_saves_is_killed(python, shard_set, tmp_path, numbers, tally: Tally):
    done = train(python, shard_set, tmp_path / "whole", processes=2)
    assert done.returncode == 0, done.stderr
    for number in numbers:
        run = tmp_path / f"kill-{number}"
        killed = train(python, shard_set, run, f"kill-{number}", processes=2)
        assert "SIGKILL" in killed.stderr, killed.stderr
        done = train(python, shard_set, run, processes=2)
        assert done.returncode == 0, done.stderr
        check_same(tmp_path / "whole", run)
        tally("training: SIGKILL inside saves, on two processes", 1)
