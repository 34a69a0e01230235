"""A build that is killed at any moment is completed by the same command, to the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.build import build
from shards.errors import ShardSetError, UsageError
from shards.pack import WORK
from shards.plan import BuildOptions
from shards.reader import ShardSet

OPTIONS = BuildOptions(size=64, samples_per_shard=4, split="train=0.7,val=0.3")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("source")
    for number in range(40):
        # Noise of this size keeps a build busy long enough for a signal to find it at work.
        noise = np.random.default_rng(number).integers(0, 255, (600, 750, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"I{number}.jpg")
        Image.fromarray(noise[..., 0] // 128 * 255).save(folder / f"I{number}_segmentation.png")
    return str(folder)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def whole(source: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "set"
    build(source, source, out, OPTIONS, workers=1)
    return content(out)


def start(source: str, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "shards", "build", "--images", source, "--masks", source, "--out", str(out)]
    command += ["--size", "64", "--samples-per-shard", "4", "--split", OPTIONS.split, "--workers", "2"]
    return subprocess.Popen(command, start_new_session=True, preexec_fn=heed_ctrl_c)


def heed_ctrl_c() -> None:
    """A shell starts background jobs deaf to Ctrl-C, and the tests may run in one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(out: Path, shards: int, process: subprocess.Popen) -> None:
    while len(list(out.glob("*/*.tar"))) < shards and process.poll() is None:
        time.sleep(0.002)


def gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("shards", [0, 1, 5])
def test_killed_and_run_again_gives_the_same_bytes(source: str, whole: dict[str, bytes], tmp_path: Path, shards: int):
    out = tmp_path / "set"
    process = start(source, out)
    while not (out / WORK / "plan.json").exists():
        time.sleep(0.002)
    wait_for(out, shards, process)
    process.kill()  # the parent only: its workers must end by themselves
    process.wait()
    deadline = time.monotonic() + 10
    while not gone(process.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert gone(process.pid)
    with pytest.raises(ShardSetError, match="no complete shard set"):
        ShardSet.open(out)
    kept = {path: path.stat().st_mtime_ns for path in (out / WORK).glob("*-*.json")}
    shards_kept = {p.stem.replace("-", "/") + ".tar" for p in kept}
    times = {name: (out / name).stat().st_mtime_ns for name in shards_kept}
    build(source, source, out, OPTIONS, workers=2)
    assert content(out) == whole
    assert all((out / name).stat().st_mtime_ns == when for name, when in times.items())


def test_ctrl_c_is_one_line_and_a_rerun_completes(source: str, whole: dict[str, bytes], tmp_path: Path):
    out = tmp_path / "set"
    process = start(source, out)
    wait_for(out, 1, process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(20) == 130
    build(source, source, out, OPTIONS, workers=1)
    assert content(out) == whole


def test_a_begun_build_with_other_options_is_refused(source: str, tmp_path: Path):
    out = tmp_path / "set"
    process = start(source, out)
    wait_for(out, 1, process)
    process.kill()
    process.wait()
    with pytest.raises(UsageError, match=r"differs in seed \(0 there, 3 here\)"):
        build(source, source, out, BuildOptions(size=64, samples_per_shard=4, split=OPTIONS.split, seed=3))


def test_a_killed_worker_is_one_line_and_a_rerun_completes(source: str, whole: dict[str, bytes], tmp_path: Path):
    out = tmp_path / "set"
    command = [sys.executable, "-c", KILLED_WORKER, source, str(out)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert process.returncode == 1
    assert process.stderr.startswith("error: a worker process was killed")
    assert process.stderr.count("\n") == 1
    build(source, source, out, OPTIONS, workers=2)
    assert content(out) == whole


KILLED_WORKER = """
import os, signal, sys
import shards.build
from shards import cli

pack = shards.build._pack

def pack_and_die(shard, run, tick):
    if shard.name == "train/000003.tar":
        os.kill(os.getpid(), signal.SIGKILL)
    return pack(shard, run, tick)

pack_and_die.__qualname__, pack_and_die.__module__ = "_pack", "shards.build"
shards.build._pack = pack_and_die
words = ["--images", sys.argv[1], "--masks", sys.argv[1], "--out", sys.argv[2], "--workers", "2"]
cli.main(["build", *words, "--size", "64", "--samples-per-shard", "4", "--split", "train=0.7,val=0.3"])
"""
