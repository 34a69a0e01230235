"""The GPU kit runs on a CPU in its short form, so that it works when a GPU is there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu.kit import SHORT, Kit
from benchmarks.gpu.rows import Kernel, Outcome, Report, Row, run_row

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the results of the short kit."""
    out = tmp_path_factory.mktemp("kit")
    command = [sys.executable, "-m", "benchmarks.gpu", "--short", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.slow
def test_the_short_kit_runs_every_row_that_needs_no_gpu(kit):
    rows = {row["name"]: row for row in json.loads((kit / "gpu.json").read_text())["rows"]}
    assert {row["result"] for row in rows.values()} == {"passed", "measured", "needs a GPU"} | (
        set() if shutil.which("c++") else {"needs a compiler"}
    )
    passed = {name for name, row in rows.items() if row["result"] == "passed"}
    assert passed >= {"dropout mask", "float64 on 1, 2 ranks", "resume, float32", "killed rank", "stop signal"}
    needs_gpu = {name for name, row in rows.items() if row["result"] == "needs a GPU"}
    assert needs_gpu >= {"nccl", "waits per step", "out of memory", "non-finite steps, fp16", "loop, compiled"}
    assert rows["bare step, 4 x 48, float32"]["values"]["images_per_s"] > 0
    kernels = rows["kernels, 4 x 48, float32"]["kernels"]
    assert "aten::convolution_backward" in [each["name"] for each in kernels[:5]]
    assert all(each["calls"] > 0 and each["ms"] > 0 for each in kernels)


@pytest.mark.slow
def test_every_row_is_in_the_table_and_explained_in_the_readme(kit):
    table = (kit / "gpu.md").read_text()
    readme = (ROOT / "benchmarks" / "gpu" / "README.md").read_text()
    for row in json.loads((kit / "gpu.json").read_text())["rows"]:
        assert f"| {row['name']} | {row['result']} |" in table
        assert f"| {row['name']} | calls | ms |" in table or not row["kernels"]
        assert f"| {re.split(', | on ', row['name'])[0]}" in readme or row["name"] in readme, row["name"]


def test_the_table_shows_the_longest_kernels_and_the_json_file_more(tmp_path):
    kernels = [Kernel(name=f"void conv<{number}|{'x' * 200}>", calls=2, ms=9 - number / 9) for number in range(40)]
    Report(tmp_path, {}).add(Row(name="kernels", result="measured", kernels=kernels))
    assert [Kernel(**each) for each in json.loads((tmp_path / "gpu.json").read_text())["rows"][0]["kernels"]] == kernels
    lines = [line for line in (tmp_path / "gpu.md").read_text().splitlines() if "void conv" in line]
    assert len(lines) == 10
    assert re.fullmatch(r"\| void conv<0\\\|x{86,88} \| 2 \| 9\.00 \|", lines[0])


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


LOSING = """
import functools, os, sys, time
from benchmarks.gpu import rows

names = sys.argv[sys.argv.index("--names") + 1 :]
rows.device_answers = lambda: "sticky" not in failed
failed = []

def check(name):
    if name == "dies":
        os._exit(1)
    if name == "hangs":
        time.sleep(60)
    if name != "right":
        failed.append(name)
        raise RuntimeError(f"CUDA error: {name}")
    return rows.Outcome(detail=f"of {len(names)}")

rows.emit_rows({name: functools.partial(check, name.split()[0]) for name in names})
"""


def test_a_row_that_hangs_fails_and_no_later_one(tmp_path, monkeypatch):
    (tmp_path / "losing.py").write_text(LOSING)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    report = Report(tmp_path / "out", {})
    kit = Kit(images="", masks="", work=tmp_path, report=report, sizes=SHORT, gpus=0, deadline=time.monotonic() + 100)
    kit.child_rows("losing", ["right 1", "hangs", "right 2"], seconds=9, env={})
    assert [(row.name, row.result) for row in report.rows] == [
        ("right 1", "passed"),
        ("hangs", "failed"),
        ("right 2", "passed"),
    ]
    assert "stopped after 9 s" in report.rows[1].detail


def test_a_lost_device_fails_its_row_and_no_later_one(tmp_path, monkeypatch):
    """An error of CUDA that every later call would repeat: the next row has a new process."""
    (tmp_path / "losing.py").write_text(LOSING)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    report = Report(tmp_path / "out", {})
    kit = Kit(images="", masks="", work=tmp_path, report=report, sizes=SHORT, gpus=0, deadline=time.monotonic() + 100)
    names = ["right 1", "passing", "right 2", "sticky", "right 3", "dies", "right 4", "sticky again"]
    kit.child_rows("losing", names, seconds=90, env={})
    assert [(row.name, row.result, row.detail.split()[-1]) for row in report.rows] == [
        ("right 1", "passed", "8"),
        ("passing", "failed", "passing"),
        ("right 2", "passed", "8"),
        ("sticky", "failed", "sticky"),
        ("right 3", "passed", "4"),
        ("dies", "failed", "1"),
        ("right 4", "passed", "2"),
        ("sticky again", "failed", "sticky"),
    ]


HIDDEN = """
import importlib.metadata, sys

sys.modules["wandb"] = None
version = importlib.metadata.version

def without_isicdist(name):
    if name == "isicdist":
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)

importlib.metadata.version = without_isicdist
"""


def test_a_run_of_the_kit_needs_neither_wandb_nor_an_installed_project(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HIDDEN)
    command = [sys.executable, "-m", "benchmarks.gpu", "--short", "--out", str(tmp_path / "out"), "--only", "one step"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "WANDB_MODE": "online"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "     passed  train one step" in done.stdout
