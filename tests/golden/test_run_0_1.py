"""A run of version 0.1, whose layers, settings and state had other names, is used and resumed by this version.

`run-0.1` was written by `isicdist train --data set --config debug.toml --model.base-channels 1 --steps 4 --keep 1`;
`run-0.1/expected.json` holds what version 0.1 itself predicted with it, and the metrics of its steps 5 to 8.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from isicdist.network.segmenter import load_model
from shards.reader import ShardSet

HERE = Path(__file__).parent
RUN = HERE / "run-0.1"
EXPECTED: dict[str, Any] = json.loads((RUN / "expected.json").read_text())


def test_the_best_model_gives_the_same_probabilities():
    model, split = load_model(RUN), ShardSet.open(HERE / "set").split("val")
    images = np.stack([split.image(index) for index in range(len(split))])  # (B, H, W, 3)
    probs = model(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()[:, 0]  # (B, H, W)
    assert np.diagonal(probs[0])[::4] == pytest.approx(EXPECTED["diagonal"], abs=1e-5)
    assert probs.mean(axis=(1, 2), dtype=np.float64) == pytest.approx(EXPECTED["mean_probs"], abs=1e-5)
    assert (model.threshold, model.metadata.step, model.metadata.data_digest) == (1 / 256, 4, split.digest)


def test_the_resumed_run_trains_as_it_would_have(python, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(RUN, run)
    words = ("train", "--data", HERE / "set", "--run", run, "--config", HERE / "debug.toml")
    done = python("-m", "isicdist", *words, "--model.base-channels", "1")  # whose config says 8 steps
    assert done.returncode == 0, done.stderr
    assert "resumed from step-00000004, step 4 of 8" in done.stdout
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for event in ("train", "evaluate"):
        later = [line for line in lines if line["event"] == event and line["step"] > 4]
        assert len(later) == len(EXPECTED[event])
        for line, expected in zip(later, EXPECTED[event], strict=True):
            assert {name: line[name] for name in expected} == pytest.approx(expected, abs=1e-4), line
