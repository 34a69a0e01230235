"""A build that is killed at any moment is completed by the same command, to the same bytes."""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.build import build
from shards.errors import ShardSetError, ToolkitError, UsageError
from shards.planning.plan import BuildOptions
from shards.reader import ShardSet
from shards.writing.records import read_record
from shards.writing.target import WORK, FolderTarget
from tests.faults.conftest import FULL, Tally, times

OPTIONS = BuildOptions(size=64, samples_per_shard=4, split="train=0.7,val=0.3")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("source")
    for number in range(40):
        # Noise of this size keeps a build busy long enough for a signal to find it at work.
        noise = np.random.default_rng(number).integers(0, 255, (400, 520, 3), dtype=np.uint8)
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


def command(source: str, out: Path | str, *where: str) -> list[str]:
    words = ["--images", source, "--masks", source, "--out", str(out), "--size", "64", *(where or ("--workers", "2"))]
    return [sys.executable, "-m", "shards", "build", *words, "--samples-per-shard", "4", "--split", OPTIONS.split]


def start(source: str, out: Path | str, *where: str) -> subprocess.Popen:
    return subprocess.Popen(command(source, out, *where), start_new_session=True, preexec_fn=heed_ctrl_c)


def heed_ctrl_c() -> None:
    """A shell starts background jobs deaf to Ctrl-C, and the tests may run in one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def no_room() -> None:
    """A file cannot grow beyond 20 kB: the system refuses a write in the middle, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


def wait_for(out: Path, parts: int, process: subprocess.Popen) -> None:
    """Until that many parts are encoded."""
    while len(list((out / WORK).glob("0-*.json"))) < parts and process.poll() is None:
        time.sleep(0.002)


def gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("parts", [0, 1, 12])
def test_killed_and_run_again_gives_the_same_bytes(source: str, whole: dict[str, bytes], tmp_path: Path, parts: int):
    out = tmp_path / "set"
    process = start(source, out)
    while not (out / WORK / "plan.json").exists():
        time.sleep(0.002)
    wait_for(out, parts, process)
    process.kill()  # the parent only: its workers must end by themselves
    process.wait()
    deadline = time.monotonic() + 10
    while not gone(process.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert gone(process.pid)
    with pytest.raises(ShardSetError, match="no complete shard set"):
        ShardSet.open(out)
    records = [read_record(FolderTarget(out), f"{WORK}/{path.name}") for path in (out / WORK).glob("0-*.json")]
    kept = sum(len(record["samples"]) for record in records)
    assert len(records) >= parts
    reports: list[tuple[int, int, str]] = []
    build(source, source, out, OPTIONS, workers=1, report=lambda *report: reports.append(report))
    assert reports[0] == (kept + 1, 40, "packing")  # what was encoded is not encoded again
    assert content(out) == whole


def torn(out: Path) -> list[str]:
    """Shards under their final name that are not whole."""
    published = [path for path in out.rglob("*") if path.is_file() and WORK not in path.parts]
    return [str(path) for path in published if path.suffix == ".tar" and not is_tar(path)]


def is_tar(path: Path) -> bool:
    try:
        with tarfile.open(path) as tar:
            tar.getmembers()
    except tarfile.TarError:
        return False
    return path.read_bytes().endswith(bytes(1024))


@pytest.fixture(scope="module")
def dask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Dask cluster of two workers."""
    pytest.importorskip("distributed", reason="pip install 'isicdist[cluster]'")
    from tests.shards.parallel.test_dask import Dask

    running = Dask(tmp_path_factory.mktemp("dask"))
    try:
        running.wait_for_scheduler()
        for _ in range(2):
            running.add_worker()
        yield running.address
    finally:
        running.stop()


@pytest.mark.parametrize(
    ("where", "number"),
    [
        ("in a folder", times(40, 3)),
        pytest.param("into a URL", 20, marks=pytest.mark.skipif(not FULL, reason="make test-faults")),
        pytest.param("under Dask", 20, marks=pytest.mark.skipif(not FULL, reason="make test-faults")),
    ],
)
def test_killed_at_random_moments_nothing_is_torn_and_a_rerun_gives_the_same_bytes(
    request, source: str, whole: dict[str, bytes], tmp_path: Path, where: str, number: int, tally: Tally
):
    moments, killed = random.Random(0), 0
    words = ["--scheduler", request.getfixturevalue("dask")] if where == "under Dask" else []

    def begin(name: str) -> tuple[subprocess.Popen, Path | str, Path]:
        """Start a build and wait for its plan; the process, the target and its folder."""
        out = tmp_path / name
        target = f"file://{out}" if where == "into a URL" else out
        process = start(source, target, *words)
        while not (out / WORK / "plan.json").exists():
            assert process.poll() is None
            time.sleep(0.002)
        return process, target, out

    process, *_ = begin("undisturbed")
    planned = time.monotonic()
    assert process.wait() == 0
    seconds = time.monotonic() - planned
    for trial in range(number):
        process, target, out = begin(f"set-{trial}")
        time.sleep(moments.uniform(0, seconds))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            killed += 1
        else:  # it had ended before: builds are quicker than the first one was
            seconds *= 0.9
        assert torn(out) == []
        build(source, source, target, OPTIONS, workers=1)
        assert content(out) == whole
    assert killed >= number // 2
    tally(f"build {where}: SIGKILL at random moments", killed)


def test_killed_before_each_fsync_and_rename_a_rerun_gives_the_same_bytes(
    source: str, whole: dict[str, bytes], tmp_path: Path, tally: Tally
):
    calls = range(1, 1000, times(1, 47))
    tried = 0
    for call in calls:
        out = tmp_path / f"set-{call}"
        words = [sys.executable, "-c", KILLED_AT_CALL, str(call), *command(source, out)[3:]]
        process = subprocess.run(words, capture_output=True, timeout=60, check=False, start_new_session=True)
        if process.returncode == 0:
            assert content(out) == whole
            break
        assert process.returncode == -signal.SIGKILL, process.stderr
        tried += 1
        assert torn(out) == []
        build(source, source, out, OPTIONS, workers=1)
        assert content(out) == whole
    assert tried > times(30, 1)
    tally("build: SIGKILL before an fsync or a rename", tried)


@pytest.mark.parametrize("loss", ["cut", "flip", "flip in a header", "cut in a padding"])
def test_a_part_that_is_damaged_after_its_record_is_found_and_encoded_again(
    source: str, whole: dict[str, bytes], tmp_path: Path, loss: str, tally: Tally
):
    chosen, number = random.Random(1), times(20, 2)
    for trial in range(number):
        out = tmp_path / f"set-{trial}"
        words = [sys.executable, "-c", KILLED_WORKER, source, str(out), "write_shard"]
        subprocess.run(words, capture_output=True, timeout=60, check=False)
        tars = sorted(path for path in (out / WORK).glob("0-*.tar"))
        path = chosen.choice(tars)
        data = bytearray(path.read_bytes())
        if loss == "cut":
            del data[chosen.randrange(len(data)) :]
        elif loss == "cut in a padding":
            del data[-1]
        else:
            data[0 if "header" in loss else 600] ^= 1  # 600: in the first member, behind its header
        path.write_bytes(data)
        with contextlib.suppress(ToolkitError):  # one of headers and paddings alone does no harm
            build(source, source, out, OPTIONS, workers=1)
        build(source, source, out, OPTIONS, workers=1)
        assert content(out) == whole
    tally(f"build: a part's tar damaged after its record ({loss})", number)


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


@pytest.mark.parametrize("when", ["encode_part", "write_shard"])
def test_a_killed_worker_is_one_line_and_a_rerun_completes(
    source: str, whole: dict[str, bytes], tmp_path: Path, when: str
):
    out = tmp_path / "set"
    words = [sys.executable, "-c", KILLED_WORKER, source, str(out), when]
    process = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert process.returncode == 1
    assert process.stderr.startswith("error: a worker process was killed")
    assert process.stderr.count("\n") == 1
    recorded = {path.stem.replace("-", "/") + ".tar" for path in (out / WORK).glob("[tv]*-*.json")}
    times = {name: (out / name).stat().st_mtime_ns for name in recorded}
    assert len(times) >= (when == "write_shard")
    build(source, source, out, OPTIONS, workers=2)
    assert content(out) == whole
    assert {name: (out / name).stat().st_mtime_ns for name in times} == times  # these were not written again


def test_two_builds_in_one_folder_do_not_meet(source: str, whole: dict[str, bytes], tmp_path: Path):
    out = tmp_path / "set"
    process = start(source, out)
    wait_for(out, 1, process)
    with pytest.raises(UsageError, match="another build is at work there"):
        build(source, source, out, OPTIONS, workers=1)
    assert process.wait(60) == 0
    assert content(out) == whole


def test_a_disk_that_is_full_is_one_line_with_the_file_and_a_rerun_completes(
    source: str, whole: dict[str, bytes], tmp_path: Path
):
    out = tmp_path / "set"
    process = subprocess.run(
        command(source, out), capture_output=True, text=True, timeout=60, check=False, preexec_fn=no_room
    )
    assert process.returncode == 1
    assert re.fullmatch(rf"error: {out}/\S+\.tar: File too large\n", process.stderr)
    assert not list(out.rglob("*.part"))
    build(source, source, out, OPTIONS, workers=2)
    assert content(out) == whole


KILLED_AT_CALL = """
import os, signal, sys

number, calls = int(sys.argv.pop(1)), 0

def counted(call):
    def wrapper(*args, **kwargs):
        global calls
        calls += 1
        if calls == number:
            os.killpg(os.getpgrp(), signal.SIGKILL)
        return call(*args, **kwargs)
    return wrapper

for name in ("fsync", "rename", "replace"):
    setattr(os, name, counted(getattr(os, name)))
from shards import cli
cli.main(sys.argv[1:])
"""

KILLED_WORKER = """
import os, signal, sys
import shards.writing.stages
from shards import cli

name = sys.argv[3]
work = getattr(shards.writing.stages, name)

def work_and_die(item, job, advance):
    if name == "encode_part" and item.name == "0-000003" or name == "write_shard" and item[0].number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return work(item, job, advance)

work_and_die.__qualname__, work_and_die.__module__ = name, "shards.writing.stages"
setattr(shards.writing.stages, name, work_and_die)
words = ["--images", sys.argv[1], "--masks", sys.argv[1], "--out", sys.argv[2], "--workers", "2"]
cli.main(["build", *words, "--size", "64", "--samples-per-shard", "4", "--split", "train=0.7,val=0.3"])
"""
