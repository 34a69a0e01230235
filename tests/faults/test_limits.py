"""Little shared memory, few open files, little memory for one rank: it works, or one line says what is too small."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.faults.conftest import Tally, root_only

pytestmark = root_only

LAUNCH = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1")
LAUNCH += ("--num_processes", "2", "--main_process_port", "0", "--mixed_precision", "no")
SMALL = ("--steps", "4", "--epochs", "9", "--batch.global-size", "6", "--model.base-channels", "2", "--tracker", "none")
CGROUPS = Path("/sys/fs/cgroup")


def run(command: Sequence[object]) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=env, timeout=240, check=False)


def test_shared_memory_of_16_mb_is_enough(shard_set: Path, tmp_path: Path, tally: Tally):
    """The readers are threads: no sample goes through shared memory."""
    mounted = ["unshare", "--mount", "sh", "-ec", 'mount -t tmpfs -o size=16m none /dev/shm; exec "$@"', "sh"]
    done = run([*mounted, *LAUNCH, "-m", "isicdist", "train", "--data", shard_set, "--run", tmp_path / "run", *SMALL])
    assert done.returncode == 0, done.stderr
    tally("limits: /dev/shm of 16 MB", 1)


@pytest.mark.parametrize("files", [12, 16, 20, 64])
def test_few_open_files_are_enough_or_are_named(
    shard_set: Path, archive: tuple[Path, Path], tmp_path: Path, files: int, tally: Tally
):
    commands = [
        ["isicdist", "train", "--data", shard_set, "--run", tmp_path / "run", *SMALL],
        ["shards", "build", "--images", archive[0], "--masks", archive[1], "--out", tmp_path / "set", "--workers", 2],
    ]
    for words in commands:
        done = run(["prlimit", f"--nofile={files}:{files}", sys.executable, "-m", *words])
        if done.returncode or files == 12:
            said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
            assert len(said) == 1, done.stderr
            assert "ulimit -n" in said[0], done.stderr
        tally(f"limits: {files} open files", 1)


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group of 150 MB, of version 1 or 2."""
    parent, name = (
        (CGROUPS / "memory", "memory.limit_in_bytes") if (CGROUPS / "memory").is_dir() else (CGROUPS, "memory.max")
    )
    group = parent / f"isicdist-{os.getpid()}"
    try:
        group.mkdir()
        (group / name).write_text(str(150 * 2**20))
    except OSError as error:
        pytest.skip(f"no control group of memory: {error}")
    yield group
    group.rmdir()


IN_GROUP = """
import os, sys
from pathlib import Path

if os.environ["RANK"] == "1":
    (Path(sys.argv[1]) / "cgroup.procs").write_text(str(os.getpid()))
from isicdist.cli import main
main(sys.argv[2:])
"""


def test_a_rank_that_the_system_kills_for_its_memory_is_named(
    shard_set: Path, tmp_path: Path, small_group: Path, tally: Tally
):
    script = tmp_path / "in_group.py"
    script.write_text(IN_GROUP)
    done = run([*LAUNCH, script, small_group, "train", "--data", shard_set, "--run", tmp_path / "run", *SMALL])
    assert done.returncode == 1
    assert re.search(r"rank +: 1 .*\n.*exitcode +: -9 .*\(SIGKILL\)", done.stderr), done.stderr
    tally("limits: 150 MB of memory for one rank", 1)
