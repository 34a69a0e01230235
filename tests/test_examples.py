"""The examples run as they stand, on generated data."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from isicdist import BatchPlan
from isicdist.data.order import epoch_order
from shards import ShardSet

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def load(name: str) -> dict[str, Any]:
    return vars(importlib.import_module(f"examples.{name}"))


def test_the_readme_lists_every_example():
    listed = re.findall(r"\[`(\w+)\.py`\]", (EXAMPLES / "README.md").read_text())
    assert sorted(listed) == sorted(path.stem for path in EXAMPLES.glob("*.py"))


def test_predict_writes_a_mask_at_the_resolution_of_the_photograph(archive, tmp_path, capsys):
    photographs = sorted(archive[0].glob("*.jpg"))[:2]
    load("predict")["main"]([str(ROOT / "tests/golden/run-0.1"), str(tmp_path / "masks"), *map(str, photographs)])
    for path in photographs:
        with Image.open(tmp_path / "masks" / f"{path.stem}.png") as mask, Image.open(path) as photograph:
            assert mask.size == photograph.size
            assert set(mask.tobytes()) <= {0, 255}
    assert capsys.readouterr().out.count("% lesion\n") == 2


def test_own_dataset_keeps_a_patient_in_one_split(tmp_path, capsys):
    load("own_dataset")["main"]([str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    patients = [patient for line in lines[:3] for patient in line.split("patients ")[1].split(", ")]
    assert len(patients) == len(set(patients)) == 20
    assert sum(int(line.split()[1]) for line in lines[:3]) == 60


IN_FLOAT64 = f"""
import runpy, torch
torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double
runpy.run_path({str(EXAMPLES / "own_loop.py")!r}, run_name="__main__")
"""


def test_own_loop_learns_and_is_the_same_on_two_processes(shard_set, python, tmp_path):
    """In float64: in float32 Adam's first updates magnify what another order of sums rounds off."""
    script = tmp_path / "own_loop_in_float64.py"
    script.write_text(IN_FLOAT64)
    runs = [python(script, shard_set, "--epochs", 2, processes=n) for n in (1, 2)]
    losses: list[list[float]] = []
    for done in runs:
        assert done.returncode == 0, done.stderr
        losses.append([float(value) for value in re.findall(r"loss ([\d.]+)", done.stdout)])
    assert losses[0][1] < losses[0][0]
    assert losses[1] == losses[0]  # to the four digits that are printed


@pytest.mark.parametrize("workers", [0, 2])
def test_webdataset_pipeline_yields_the_planned_order(shard_set, workers):
    batches: Callable[..., Any] = load("webdataset_pipeline")["batches"]
    split = ShardSet.open(shard_set).split("train")
    order = epoch_order(split, seed=0, epoch=0)
    plan = BatchPlan(global_size=8, micro_size=4, world_size=2)
    for rank in range(2):
        keys = [
            key for names, _, _ in batches(str(shard_set), rank=rank, world_size=2, workers=workers) for key in names
        ]
        steps = range(0, len(order), plan.global_size)
        expected = [split.key(i) for start in steps for i in order[start : start + plan.global_size][rank::2]]
        assert sorted(keys) == sorted(expected)
        if workers == 0:
            assert keys == expected


def test_webdataset_pipeline_prints_its_batches(shard_set, capsys):
    load("webdataset_pipeline")["main"]([str(shard_set)])
    first = capsys.readouterr().out.splitlines()[0]
    assert re.fullmatch(r"(\w+, ){3}\w+: images \(4, 64, 64, 3\), lesion \d+\.\d%", first)
