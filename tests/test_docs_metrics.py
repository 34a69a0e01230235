"""The page that documents metrics.jsonl, and the sweep that it shows."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from isicdist.training.tracking.events import EvaluationMetrics, TrainMetrics

ROOT = Path(__file__).parents[1]


def test_every_key_of_every_event_is_documented():
    tables = re.split(r"^## ", (ROOT / "docs" / "metrics.md").read_text(), flags=re.M)[1:3]
    for event, table in zip((TrainMetrics, EvaluationMetrics), tables, strict=True):
        keys = re.findall(r"^\| `(\w+)` \|", table, flags=re.M)
        assert keys == ["event", *(field.name for field in dataclasses.fields(event))]
        assert f"`{event.event}`" in table


@pytest.mark.slow
def test_the_sweep_searches_settings_that_a_run_takes(shard_set, tmp_path):
    """Start a trial as wandb's agent does: ${args} replaced in the command, the id of the run in the environment."""
    sweep = yaml.safe_load((ROOT / "examples" / "sweep.yaml").read_text())
    chosen = {"optim.lr": 0.001, "optim.bce-weight": 0.5, "model.dropout": 0.2}
    assert chosen.keys() == sweep["parameters"].keys()
    args = [f"--{name}={value}" for name, value in chosen.items()]
    command = [word for part in sweep["command"] for word in (args if part == "${args}" else [part])]
    short = ["--steps", "1", "--model.base-channels", "4", "--batch.global-size", "2", "--compile", "off"]
    environment = {"DATA": str(shard_set), "RUNS": str(tmp_path), "WANDB_RUN_ID": "trial1", "WANDB_MODE": "disabled"}
    environment |= {"LAUNCH": "launch/cpu2.yaml", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    scripts = str(Path(sys.executable).parent)
    done = subprocess.run(
        [*command, *short],
        cwd=ROOT,
        env={**os.environ, **environment, "PATH": f"{scripts}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "trial1" / "config.json").read_text())
    assert (config["optim"]["lr"], config["optim"]["bce_weight"], config["model"]["dropout"]) == (0.001, 0.5, 0.2)
