"""The GPU kit runs on a CPU in its short form, so that it works when a GPU is there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.rows import Outcome, Report, Row, run_row

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the results of the short kit."""
    out = tmp_path_factory.mktemp("kit")
    command = [sys.executable, "-m", "benchmarks.gpu", "--short", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.slow
def test_the_short_kit_runs_every_row_that_needs_no_gpu(kit):
    rows = {row["name"]: row for row in json.loads((kit / "gpu.json").read_text())["rows"]}
    assert {row["result"] for row in rows.values()} == {"passed", "measured", "needs a GPU"}
    passed = {name for name, row in rows.items() if row["result"] == "passed"}
    assert passed >= {"dropout mask", "float64 on 1, 2 ranks", "resume, float32", "killed rank", "stop signal"}
    needs_gpu = {name for name, row in rows.items() if row["result"] == "needs a GPU"}
    assert needs_gpu >= {"nccl", "waits per step", "out of memory", "non-finite steps, fp16", "loop, compiled"}
    assert rows["bare step, 4 x 48, float32"]["values"]["images_per_s"] > 0


@pytest.mark.slow
def test_every_row_is_in_the_table_and_explained_in_the_readme(kit):
    table = (kit / "gpu.md").read_text()
    readme = (ROOT / "benchmarks" / "gpu" / "README.md").read_text()
    for row in json.loads((kit / "gpu.json").read_text())["rows"]:
        assert f"| {row['name']} | {row['result']} |" in table
        assert f"| {re.split(', | on ', row['name'])[0]}" in readme or row["name"] in readme, row["name"]


def test_a_row_that_raises_has_failed_and_says_where():
    def broken() -> Outcome:
        raise ValueError("no such kernel")

    row = run_row("kernel", broken)
    assert row.result == "failed"
    assert re.fullmatch(r"ValueError at test_gpu_kit.py:\d+: no such kernel", row.detail)


def test_the_report_is_whole_after_each_row(tmp_path):
    report = Report(tmp_path, {"device": "CPU"})
    for name in ("one", "two"):
        report.add(Row(name=name, result="measured", detail="a | b", values={"step_ms": 1.5}))
        written = json.loads((tmp_path / "gpu.json").read_text())
        assert [row["name"] for row in written["rows"]][-1] == name
        assert rf"| {name} | measured | a \| b | 0.0 |" in (tmp_path / "gpu.md").read_text()
    assert report.value("two", "step_ms") == 1.5
    assert report.value("two", "images_per_s") is None


def test_rows_after_the_time_budget_are_not_run(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--short", "--budget-s", "0", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert {row["result"] for row in rows} == {"not run", "needs a GPU"}
