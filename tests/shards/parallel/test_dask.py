"""A build on a running Dask cluster: a scheduler and two worker processes on this machine's loopback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shards.build import build
from shards.errors import ToolkitError, UsageError
from shards.inputs.match import BadInputError
from shards.parallel import dask as cluster
from shards.planning.plan import BuildOptions
from shards.writing.target import WORK
from tests.conftest import ROOT
from tests.shards.conftest import write_pair
from tests.shards.test_cli import run

Client = pytest.importorskip("distributed", reason="pip install 'isicdist[cluster]'").Client

OPTIONS = BuildOptions(size=32, samples_per_shard=7, split="train=0.6,val=0.2,test=0.2")


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class Dask:
    """A scheduler and its workers, each a process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.workers = folder, []
        self.file = folder / "scheduler.json"
        options = ("--host", "127.0.0.1", "--port", "0", "--no-dashboard")
        self.scheduler = self._start("scheduler", *options, "--scheduler-file", str(self.file))
        self.address = ""

    def _start(self, *words: str) -> subprocess.Popen:
        # Elsewhere, so that a relative path would mean another file.
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        log = (self.folder / f"{words[0]}-{time.monotonic_ns()}.log").open("wb")
        with log:
            return subprocess.Popen(
                [sys.executable, "-m", "dask", *words], cwd=self.folder, env=environment, stdout=log, stderr=log
            )

    def wait_for_scheduler(self) -> None:
        deadline = time.monotonic() + 60
        while not self.file.exists() or not self.file.read_bytes().endswith(b"}"):
            assert time.monotonic() < deadline, "no scheduler within a minute"
            time.sleep(0.05)
        self.address = json.loads(self.file.read_bytes())["address"]

    def add_worker(self) -> None:
        options = ("--nthreads", "1", "--no-nanny", "--no-dashboard", "--local-directory", str(self.folder))
        self.workers.append(self._start("worker", "--scheduler-file", str(self.file), *options))

    def stop(self) -> None:
        for process in [*self.workers, self.scheduler]:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def dask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dask]:
    running = Dask(tmp_path_factory.mktemp("dask"))
    try:
        running.wait_for_scheduler()
        for _ in range(2):
            running.add_worker()
        with Client(running.address, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)  # on a busy machine they take a while
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def local(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("cluster") / "set"
    build(str(pictures), str(pictures), out, OPTIONS, workers=1)
    return content(out)


def test_a_cluster_makes_the_same_bytes(
    pictures: Path, local: dict[str, bytes], dask: Dask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    reports: list[tuple[int, int, str]] = []
    build(
        str(pictures), str(pictures), "set", OPTIONS,
        scheduler=dask.address, report=lambda *report: reports.append(report),
    )  # fmt: skip
    assert content(tmp_path / "set") == local
    assert (40, 40, "packing") in reports
    assert (40, 40, "writing") in reports


def test_a_cluster_reads_an_archive_and_completes_what_was_begun_here(
    pictures: Path, dask: Dask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    archive = shutil.make_archive(str(tmp_path / "pictures"), "zip", pictures)
    build(archive, archive, tmp_path / "here", OPTIONS, workers=1)

    def stops(*words: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shards.writing.stages.near_pairs", stops)
        with pytest.raises(KeyboardInterrupt):
            build(archive, archive, tmp_path / "set", OPTIONS, workers=1)
    assert list((tmp_path / "set" / WORK).glob("*.tar"))
    build(archive, archive, tmp_path / "set", OPTIONS, scheduler=dask.address)
    assert content(tmp_path / "set") == content(tmp_path / "here")


def test_bad_inputs_are_all_found_and_nothing_is_left(dask: Dask, tmp_path: Path):
    for number in range(12):
        write_pair(tmp_path / "in", f"I{number}", number)
    for number in (3, 7):
        (tmp_path / "in" / f"I{number}.jpg").write_bytes(b"no picture")
    options = BuildOptions(size=32, split="train=0.6,val=0.4")
    with pytest.raises(BadInputError) as caught:
        build(str(tmp_path / "in"), str(tmp_path / "in"), tmp_path / "set", options, scheduler=dask.address)
    assert {row.path for row in caught.value.rejected if row.reason == "unreadable"} == {"I3.jpg", "I7.jpg"}
    assert not (tmp_path / "set").exists()


def test_a_worker_of_other_versions_is_refused(
    pictures: Path, dask: Dask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    versions = {**cluster._versions(), "pillow": "1.0"}
    monkeypatch.setattr(cluster, "_versions", lambda: versions)
    with pytest.raises(ToolkitError, match=r"a worker of the cluster has pillow .*, not 1\.0"):
        build(str(pictures), str(pictures), tmp_path / "set", OPTIONS, scheduler=dask.address)
    assert not (tmp_path / "set" / "index.json").exists()


def test_no_scheduler_is_one_line(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 1)
    words = ("--images", pictures, "--masks", pictures, "--out", tmp_path / "set", "--scheduler")
    for address, code, told in [
        ("tcp://127.0.0.1:9", 1, "no Dask scheduler answers there"),
        ("nonsense://x:1", 1, "no Dask scheduler answers there"),
        ("nonsense", 2, "give the address of a Dask scheduler"),
    ]:
        assert run("build", *words, address) == code
        said = capsys.readouterr().err
        assert said.startswith(f"error: --scheduler {address}: {told}")
        assert said.count("\n") == 1
    assert not (tmp_path / "set").exists()


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Dask]:
    """A cluster of a test's own, to be killed."""
    (tmp_path / "dask").mkdir()
    running = Dask(tmp_path / "dask")
    try:
        running.wait_for_scheduler()
        yield running
    finally:
        running.stop()


def test_workers_of_this_machine_and_a_cluster_are_not_both_asked_for(pictures: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="--workers and --scheduler: give one of the two"):
        build(str(pictures), str(pictures), tmp_path / "set", OPTIONS, workers=2, scheduler="tcp://localhost:1")
    assert not (tmp_path / "set").exists()


def test_a_cluster_without_workers_and_one_that_dies_are_one_line_and_a_rerun_completes(
    pictures: Path, local: dict[str, bytes], own: Dask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "set"
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 2)
    with pytest.raises(ToolkitError, match="it has no worker; start some with: dask worker"):
        build(str(pictures), str(pictures), out, OPTIONS, scheduler=own.address)
    assert not out.exists()
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 30)
    own.add_worker()

    def kill(done: int, total: int, title: str = "") -> None:
        if done > 10:
            own.scheduler.send_signal(signal.SIGKILL)

    with pytest.raises(ToolkitError, match="the scheduler is gone; run the same command again"):
        build(str(pictures), str(pictures), out, OPTIONS, scheduler=own.address, report=kill)
    assert not (out / "index.json").exists()
    build(str(pictures), str(pictures), out, OPTIONS, workers=1)
    assert content(out) == local
