"""A run that is killed anywhere, inside a save too, and started again is the run that was never killed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.faults.conftest import FULL, Tally

WORKER = Path(__file__).parent / "forked_worker.py"
KILLS = [f"kill-{number}" for number in (range(2, 52, 2) if FULL else (2, 11, 16, 22, 38))]


@pytest.fixture(scope="module")
def runs(python, shard_set, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("forked")
    specs = ["whole", "reseed", *KILLS]
    for first in range(0, len(specs), 9):
        done = python(WORKER, shard_set, out, *specs[first : first + 9])
        assert done.returncode == 0, done.stderr
    return out


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


@pytest.mark.parametrize("name", [*KILLS, "reseed"])
def test_a_run_that_was_killed_or_reseeded_equals_the_one_that_was_not(runs, name, tally: Tally):
    check_same(runs / "whole", runs / name)
    tally(f"training: {'global generators seeded anew' if name == 'reseed' else 'SIGKILL inside saves'}", 1)


@pytest.mark.parametrize("name", KILLS)
def test_a_killed_save_leaves_nothing_behind(runs, name):
    left = [path.name for path in [*(runs / name).iterdir(), *(runs / name / "checkpoints").iterdir()]]
    assert "step-00000006" in left
    assert not [entry for entry in left if entry.startswith(".")]


KILLED_RANK_0 = """
import os, sys
from isicdist.cli import main
from tests.faults.forked_worker import kill_before

if os.environ["RANK"] == "0":
    kill_before(int(sys.argv[1]))
main(sys.argv[2:])
"""


@pytest.mark.skipif(not FULL, reason="make test-faults")
@pytest.mark.parametrize("numbers", [(3, 11), (16, 22, 38)])
def test_two_processes_of_which_the_one_that_saves_is_killed(python, shard_set, tmp_path, numbers, tally: Tally):
    from tests.faults.forked_worker import WORDS  # late: it imports all of isicdist

    script, env = tmp_path / "killed.py", {"PYTHONPATH": str(ROOT)}
    script.write_text(KILLED_RANK_0)
    train = ("train", "--data", shard_set, *WORDS, "--run")
    done = python("-m", "isicdist", *train, tmp_path / "whole", processes=2)
    assert done.returncode == 0, done.stderr
    for number in numbers:
        run = tmp_path / f"kill-{number}"
        killed = python(script, number, *train, run, processes=2, env=env)
        assert "(SIGKILL)" in killed.stderr, killed.stderr
        done = python("-m", "isicdist", *train, run, processes=2)
        assert done.returncode == 0, done.stderr
        check_same(tmp_path / "whole", run)
        tally("training: SIGKILL inside saves, on two processes", 1)
