"""The first losses of a debug run, in float64, are what they were: nothing has changed the science unnoticed.

Where a change is meant to, write the new ones down, and say in the commit why they differ:

    GOLDEN=renew python -m pytest tests/golden

The shard set beside it is kept, too, so that a change of how sets are built does not show here: 20 pairs of
`isicdist synth --samples 20 --seed 7`, built with `--size 32 --split train=0.75,val=0.25`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent
WORKER = HERE.parent / "isicdist" / "train_worker.py"
NAMES = ("step", "epoch", "samples", "loss", "pooled_dice", "lr", "grad_norm")


def test_the_first_losses_are_what_they_were(python, tmp_path):
    words = ("train", "--data", HERE / "set", "--run", tmp_path / "run", "--config", HERE / "debug.toml")
    done = python(WORKER, "float64", *words)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [{name: line[name] for name in NAMES} for line in lines if line["event"] == "train"]
    if os.environ.get("GOLDEN") == "renew":
        (HERE / "losses.json").write_text("[\n" + ",\n".join(f" {json.dumps(line)}" for line in losses) + "\n]\n")
    kept = json.loads((HERE / "losses.json").read_text())
    assert len(losses) == len(kept) == 8
    for line, was in zip(losses, kept, strict=True):
        assert line == pytest.approx(was, abs=1e-5), f"step {line['step']}"
