"""A disk that is full, or read-only: one line with path and cause, what was saved stands, and a rerun completes."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from isicdist.network.best import load_best
from isicdist.training import checkpoint
from shards.errors import ShardSetError
from shards.reader import ShardSet
from tests.faults.conftest import Tally, root_only

pytestmark = root_only


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own in memory; `mount -o remount` changes its size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=4k,nr_inodes=2000", "none", str(folder))
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def words_of(what: str, archive: tuple[Path, Path], shard_set: Path, trained: Path, out: Path) -> Sequence[object]:
    """The command that writes to `out`."""
    images, masks = archive
    small = ["--model.base-channels", 4, "--steps", 6, "--checkpoint-every", 1, "--eval-every", 2]
    small += ["--checkpoint-min-seconds", 0, "--tracker", "none"]
    build = ["--images", images, "--masks", masks, "--out", out, "--size", 64, "--samples-per-shard", 4]
    return {
        "build": ["shards", "build", *build, "--workers", 2],
        "train": ["isicdist", "train", "--data", shard_set, "--run", out, "--recipe", "demo", *small],
        "evaluate": ["isicdist", "evaluate", "--data", shard_set, "--checkpoint", trained, "--out", out],
        "predict": ["isicdist", "predict", "--images", images, "--checkpoint", trained, "--out", out, "--overlay"],
        "export": ["isicdist", "export", trained, "--out", out / "model.onnx"],
        "report": ["isicdist", "report", trained, "--out", out / "report.html"],
    }[what]


@pytest.fixture(scope="module")
def trained(python, shard_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    words = ["--recipe", "demo", "--model.base-channels", 4, "--steps", 2, "--log-every", 1, "--tracker", "none"]
    done = python("-m", "isicdist", "train", "--data", shard_set, "--run", run, *words)
    assert done.returncode == 0, done.stderr
    return run


@pytest.mark.parametrize("kilobytes", [4, 40, 200])
@pytest.mark.parametrize("what", ["build", "train", "evaluate", "predict", "export", "report"])
def test_a_full_disk_is_one_line_and_a_rerun_completes(
    python, archive, shard_set, trained, small_disk: Path, what: str, kilobytes: int, tally: Tally
):
    out = small_disk / "out"
    command = ["-m", *words_of(what, archive, shard_set, trained, out)]
    mount("-o", f"remount,size={kilobytes}k", str(small_disk))
    full = python(*command)
    if full.returncode == 0:
        pytest.skip("it all fits")
    assert full.returncode == 1, full.stderr
    said = [line for line in full.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, full.stderr
    assert "Traceback" not in full.stderr
    assert str(small_disk) in said[0]
    assert "No space left" in said[0] or "full" in said[0]
    if what == "build":
        with pytest.raises(ShardSetError, match="no complete shard set"):
            ShardSet.open(out)
    if what == "train" and (out / "best").exists():
        load_best(out)
    if what == "train" and (out / "checkpoints").exists():
        checkpoint.newest(out, lambda text: pytest.fail(text))
    mount("-o", "remount,size=200m", str(small_disk))
    again = python(*command)
    assert again.returncode == 0, again.stderr
    assert not list(out.rglob(".*.new"))
    tally(f"disk full: {what}", 1)


@pytest.mark.parametrize("what", ["build", "train", "evaluate", "predict", "export", "report"])
def test_a_read_only_disk_is_one_line(python, archive, shard_set, trained, small_disk: Path, what: str, tally: Tally):
    mount("-o", "remount,ro", str(small_disk))
    done = python("-m", *words_of(what, archive, shard_set, trained, small_disk / "out"))
    assert done.returncode == 1, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert str(small_disk) in said[0]
    assert "Read-only" in said[0]
    tally(f"disk read-only: {what}", 1)
