"""A run that goes on with another number of processes each time is the run that one process made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults.conftest import FULL, Tally

pytestmark = pytest.mark.skipif(not FULL, reason="make test-faults; tests/isicdist/test_train.py has a short form")

WORKER = Path(__file__).parent / "faulty_worker.py"
WORDS = ("--steps", 14, "--epochs", 9, "--batch.global-size", 6, "--model.base-channels", 2, "--log-every", 1)
WORDS += ("--eval-every", 5)
STOPS_AT, NEVER = 4, 999


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("dtype", "rate", "within"), [("float64", 2e-3, 1e-9), ("float32", 1e-5, 1e-5)])
def test_one_then_two_then_three_then_one_process_train_as_one(
    python, shard_set: Path, tmp_path: Path, dtype: str, rate: float, within: float, seed: int, tally: Tally
):
    whole, legs = tmp_path / "whole", tmp_path / "legs"
    train = ("train", "--data", shard_set, "--seed", seed, "--optim.lr", rate, *WORDS, "--run")
    done = python(WORKER, "stop", NEVER, NEVER, *train, whole, env={"DTYPE": dtype})
    assert done.returncode == 0, done.stderr
    for world_size in (1, 2, 3):
        done = python(WORKER, "stop", STOPS_AT, NEVER, *train, legs, processes=world_size, env={"DTYPE": dtype})
        assert f"stopped by a signal after step {STOPS_AT * world_size}" in done.stderr
    done = python(WORKER, "stop", NEVER, NEVER, *train, legs, env={"DTYPE": dtype})
    assert done.returncode == 0, done.stderr
    for one, other in zip(lines(whole), lines(legs), strict=True):
        assert [one[key] for key in ("event", "step")] == [other[key] for key in ("event", "step")]
        for key in ("samples", "epoch", "n"):
            assert one.get(key) == other.get(key)
        if "loss" in one:
            assert other["loss"] == pytest.approx(one["loss"], rel=0, abs=within)
    tally(f"training: world size 1, 2, 3, 1 over resumes ({dtype})", 1)
