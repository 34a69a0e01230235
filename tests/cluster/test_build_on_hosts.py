"""Build a shard set on several hosts: Dask workers of which one is killed, and a job of SLURM."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from shards.build import build
from shards.planning.plan import BuildOptions
from tests.cluster import slurm as scheduler
from tests.cluster.hosts import ROOT, wait_for
from tests.cluster.slurm import slurm

pytest.importorskip("distributed", reason="pip install 'isicdist[cluster]'")
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
FLAGS = ("--size", 64, "--samples-per-shard", 2, "--split", "train=0.6,val=0.2,test=0.2")
OPTIONS = BuildOptions(size=64, samples_per_shard=2, split="train=0.6,val=0.2,test=0.2")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def words(archive, tmp_path) -> tuple[object, ...]:
    build(str(archive[0]), str(archive[1]), tmp_path / "local", OPTIONS)
    return ("--images", archive[0], "--masks", archive[1], "--out", tmp_path / "set", *FLAGS)


def test_a_worker_that_is_killed_leaves_the_bytes_as_they_are(cluster, words, tmp_path):
    *machines, files = cluster
    address = f"tcp://{files.name}:8786"
    worker = ("dask", "worker", address, "--nthreads", 1, "--no-nanny", "--no-dashboard", "--local-directory", tmp_path)
    server = ("dask", "scheduler", "--port", 8786, "--no-dashboard", "--no-show")
    with (
        files.running(*server, output=tmp_path / "scheduler.log"),
        machines[0].running(*worker, output=tmp_path / "alpha.log") as killed,
        machines[1].running(*worker, output=tmp_path / "beta.log"),
    ):
        wait_for("Registered to", tmp_path / "alpha.log")
        wait_for("Registered to", tmp_path / "beta.log")
        output = tmp_path / "build.log"
        process = files.start("isic-shards", "build", "--scheduler", address, *words, output=output)
        end = time.monotonic() + 60
        while not list((tmp_path / "set").rglob("*.tar*")):
            assert process.poll() is None, output.read_text()
            assert time.monotonic() < end
            time.sleep(0.005)
        assert process.poll() is None
        killed.kill()
        assert process.wait(120) == 0, output.read_text()
    assert content(tmp_path / "set") == content(tmp_path / "local")


def test_a_job_of_slurm_builds_the_same_bytes_on_two_nodes(cluster, words, tmp_path):
    if reason := scheduler.why_not():
        pytest.skip(reason)
    *nodes, controller = cluster
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    with slurm(tmp_path / "slurm", nodes, controller) as queue:
        flags = ("--output", tmp_path / "job.log", "--nodes", 2, "--cpus-per-task", 2, "--chdir", tmp_path)
        job = queue.submit(*flags, tmp_path / "launch" / "slurm-shards.sbatch", *words)
        state = queue.wait(job, 120)
        assert state == "COMPLETED", (tmp_path / "job.log").read_text()
    assert content(tmp_path / "set") == content(tmp_path / "local")
    log = (tmp_path / "job.log").read_text()
    assert log.count("Registered to") == 4, log
