"""Dashboards that cannot be reached, fall silent or have no room: the run ends well, and its metrics.jsonl is whole."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Command
from tests.faults.conftest import FULL, Tally, root_only
from tests.faults.servers import wandb_server

pytestmark = pytest.mark.skipif(not FULL, reason="make test-faults: wandb is given a minute to end")

STEPS = 8
WORDS = ("--steps", STEPS, "--epochs", 9, "--batch.global-size", 6, "--model.base-channels", 2, "--log-every", 1)
KEY = "0123456789" * 4


def train(python: Command, data: Path, run: Path, tracker: str = "wandb", **env: str) -> str:
    """Train on one process: what it printed. It has to end well, with every step in its metrics.jsonl."""
    quiet = {"WANDB_MODE": "online", "WANDB_ERROR_REPORTING": "false", "NETRC": str(run.parent / "none")}
    words = ("-m", "isicdist", "train", "--data", data, "--run", run, "--tracker", tracker, *WORDS)
    done = python(*words, env={**quiet, **env})
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "train"] == list(range(1, STEPS + 1))
    assert events[-1]["event"] == "evaluate"
    return done.stdout


def test_wandb_without_a_network(python: Command, shard_set: Path, tmp_path: Path, tally: Tally):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        said = train(python, shard_set, tmp_path / "run", WANDB_API_KEY=KEY, WANDB_BASE_URL=url)
    assert "wandb: offline (online failed: " in said
    tally("trackers: wandb without a network", 1)


@pytest.mark.parametrize(
    ("what", "answers", "status", "mode"),
    [
        ("silent from the start", 0, 200, "wandb: offline (online failed: "),
        ("silent in mid-run", 4, 200, "wandb: http"),
        ("a wrong key", 10**9, 401, "wandb: offline (online failed: "),
    ],
)
def test_wandb_whose_server(
    python: Command, shard_set: Path, tmp_path: Path, what: str, answers: int, status: int, mode: str, tally: Tally
):
    with wandb_server(answers=answers, status=status) as server:
        said = train(python, shard_set, tmp_path / "run", WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url)
        assert server.requests.total() > (what == "silent in mid-run")
    assert mode in said
    tally(f"trackers: wandb, {what}", 1)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A run folder in which the folders of the trackers have no room at all."""
    run = tmp_path / "run"
    mounted = [run / name for name in ("wandb", "tensorboard")]
    for folder in mounted:
        folder.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "none", str(folder)], check=True)
        (folder / "full").write_bytes(bytes(4096))
    yield run
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@root_only
@pytest.mark.parametrize("tracker", ["wandb", "tensorboard"])
def test_a_full_disk_under_its_folder(python: Command, shard_set: Path, full_disk: Path, tracker: str, tally: Tally):
    said = train(python, shard_set, full_disk, tracker, WANDB_MODE="offline")
    assert tracker in said
    tally(f"trackers: {tracker}, full disk", 1)
