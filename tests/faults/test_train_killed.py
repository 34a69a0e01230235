"""A run that is killed anywhere, inside a save too, and started again is the run that was never killed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).parent / "forked_worker.py"
KILLS = [f"kill-{number}" for number in (3, 11, 16, 22, 38)]


@pytest.fixture(scope="module")
def runs(python, shard_set, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("forked")
    done = python(WORKER, shard_set, out, "whole", "reseed", *KILLS)
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


@pytest.mark.parametrize("name", [*KILLS, "reseed"])
def test_a_run_that_was_killed_or_reseeded_equals_the_one_that_was_not(runs, name):
    whole, other = learnt(runs / "whole"), learnt(runs / name)
    assert other[:3] == whole[:3]
    for parameter, state in whole[3].items():
        assert all(torch.equal(value, other[3][parameter][key]) for key, value in state.items())
    cards = [json.loads((runs / run / "best" / "model.json").read_text()) for run in ("whole", name)]
    assert cards[0] == cards[1]


@pytest.mark.parametrize("name", KILLS)
def test_a_killed_save_leaves_nothing_behind(runs, name):
    left = [path.name for path in [*(runs / name).iterdir(), *(runs / name / "checkpoints").iterdir()]]
    assert "step-00000006" in left
    assert not [entry for entry in left if entry.startswith(".")]
