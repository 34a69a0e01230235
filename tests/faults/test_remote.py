"""Shard sets behind a URL: servers that are real, servers that fail, and servers that are gone."""

from __future__ import annotations

import csv
import shutil
import socket
import time
from pathlib import Path

import numpy as np
import pytest

from isicdist.data.order import BatchPlan
from isicdist.data.stream import Stream
from shards import layout
from shards.errors import CorruptShardError, ShardSetError
from shards.reader import ShardSet
from shards.remote import folder as remote
from shards.remote.cache import NodeCache
from tests.conftest import Command
from tests.faults.conftest import Tally, full_only
from tests.faults.servers import FAULTS, NGINX, faulty, nginx, serve


def epochs(url: str, root: Path, number: int, **options: int) -> list[list[int]]:
    """The sample numbers of each epoch, read and decoded from a cache that is empty before each of them."""
    found = []
    for epoch in range(number):
        split = ShardSet.open(url, NodeCache(root=root / str(epoch), **options)).split("train")
        plan = BatchPlan(global_size=4, micro_size=4, world_size=1)
        with Stream(split, plan, 0, window=2) as stream:
            stream.epoch_number = epoch
            found.append([int(i) for batch in stream.epoch() for i in batch.indices[batch.valid]])
    return found


def test_faults_lose_no_sample_and_repeat_none(
    shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    monkeypatch.setattr(remote, "READ_TIMEOUT_SECONDS", 0.3)
    samples = len(ShardSet.open(shard_set).split("train"))
    with serve(shard_set) as plain, faulty(plain.url, 0.2, stall=1) as proxy:
        found = epochs(proxy.url, tmp_path, 5)
    assert all(sorted(epoch) == list(range(samples)) for epoch in found)
    assert len({tuple(epoch) for epoch in found}) == 5
    assert set(proxy.faults) == set(FAULTS)
    tally("HTTP: epochs with 20 % of the requests reset, stalled, cut or 5xx", 5)


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed (apt-get install nginx-light)")
@pytest.mark.parametrize("share", [0, 0.2])
def test_a_set_behind_nginx(shard_set: Path, tmp_path: Path, share: float) -> None:
    local = ShardSet.open(shard_set).split("train")
    work = tmp_path / "nginx"
    work.mkdir()
    with nginx(shard_set, work) as server, faulty(server.url, share, ("reset", "cut", "5xx")) as proxy:
        found = epochs(proxy.url if share else server.url, tmp_path / "cache", 5)
    assert all(sorted(epoch) == list(range(len(local))) for epoch in found)
    assert bool(proxy.faults) == bool(share)
    if not share:
        assert {server.requests[f"/{name}"] for name in local.shards} == {5}  # each once for each cache


@full_only
def test_a_run_on_two_processes_trains_and_scores_behind_a_url(
    shard_set: Path, tmp_path: Path, python: Command
) -> None:
    with serve(shard_set) as server:
        env = {"ISICDIST_CACHE": str(tmp_path / "cache")}
        short = ["--epochs", "2", "--batch.global-size", "8", "--model.base-channels", "4"]
        small = ["--stream.window", "1", "--stream.cache-size", "1000000"]
        words = ["-m", "isicdist", "train", "--data", server.url, "--run", tmp_path / "run", *short, *small]
        done = python(*words, processes=2, env=env)
        assert done.returncode == 0, done.stderr
        assert {times for path, times in server.requests.items() if path.endswith(".tar")} == {1}
        words = ["-m", "isicdist", "evaluate", "--data", server.url, "--checkpoint", tmp_path / "run"]
        done = python(*words, env=env)
        assert done.returncode == 0, done.stderr
    with (tmp_path / "run/evaluation/test/per_image.csv").open(newline="") as file:
        scored = [row["id"] for row in csv.DictReader(file)]
    split = ShardSet.open(shard_set).split("test")
    assert sorted(scored) == sorted(split.key(number) for number in range(len(split)))


@full_only
def test_a_server_that_has_gone_silent_ends_the_stream_in_time(shard_set: Path, tmp_path: Path) -> None:
    """With the time limits as they are. It answers for the index and the table, and then takes connections only."""
    with serve(shard_set) as plain, faulty(plain.url, 1, ("stall",), only=".tar", stall=60) as proxy:
        split = ShardSet.open(proxy.url, NodeCache(root=tmp_path)).split("train")
        plan = BatchPlan(global_size=4, micro_size=4, world_size=1)
        began = time.monotonic()
        with Stream(split, plan, 0) as stream, pytest.raises(ShardSetError, match=rf"{proxy.url}/train/0.*\.tar: not"):
            next(stream.epoch())
        assert time.monotonic() - began < 30


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"READ_TIMEOUT": 0.2, "STALL_TIMEOUT": 0.5, "MIN_BACKOFF": 0.01, "MAX_BACKOFF": 0.1}
    for name, seconds in limits.items():
        monkeypatch.setattr(remote, f"{name}_SECONDS", seconds)


@pytest.mark.usefixtures("impatient")
def test_a_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://user:secret@127.0.0.1:{free.getsockname()[1]}/set"
        with pytest.raises(ShardSetError, match=r"set/index.json: not fetched, given up after \d+ attempts") as said:
            ShardSet.open(url, NodeCache(root=tmp_path))
    assert "secret" not in str(said.value)


@pytest.mark.usefixtures("impatient")
def test_a_silent_server_is_given_up_once_for_all_its_files(shard_set: Path, tmp_path: Path) -> None:
    with serve(shard_set) as plain, faulty(plain.url, 1, ("stall",), only=".tar", stall=60) as proxy:
        split = ShardSet.open(proxy.url, NodeCache(root=tmp_path)).split("train")
        for shard in (0, 1):
            with pytest.raises(ShardSetError, match=r"tar: not fetched, given up"):
                split.open_shard(shard)
    asked = [proxy.requests[f"/{name}"] for name in split.shards[:2]]
    assert asked[0] > 1
    assert asked[1] == 1


def test_there_is_no_set_at_the_url(tmp_path: Path) -> None:
    with (
        serve(tmp_path) as server,
        pytest.raises(ShardSetError, match=r"index.json: there is no such file; check the URL of the set"),
    ):
        ShardSet.open(server.url, NodeCache(root=tmp_path / "cache"))
    assert server.requests["/index.json"] == 1


@pytest.mark.usefixtures("impatient")
def test_a_flipped_byte_on_the_server_names_shard_and_key(shard_set: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(shard_set, own)
    split = ShardSet.open(own).split("train")
    path = own / split.shards[1]
    row = int(np.flatnonzero(split.table["shard"] == 1)[2])
    data = bytearray(path.read_bytes())
    data[int(split.table["offset"][row]) + layout.BLOCK + 20] ^= 1
    path.write_bytes(data)
    with serve(own) as server:
        far = ShardSet.open(server.url, NodeCache(root=tmp_path / "cache")).split("train")
        assert far.read(0, 0)
        with pytest.raises(CorruptShardError, match=rf"{split.shards[1]}: {split.key(row)}.jpg is corrupt"):
            far.read(row - 1, 0)
        data[-1] ^= 1  # in what fills the tar up, which is no sample's
        data[int(split.table["offset"][row]) + layout.BLOCK + 20] ^= 1
        path.write_bytes(data)
        with pytest.raises(CorruptShardError, match=rf"{split.shards[1]}: not the bytes that the index names"):
            far.read(row, 0)
        path.write_bytes(bytes(data[:-1000]))
        with pytest.raises(CorruptShardError, match=rf"{split.shards[1]}: \d+ of \d+ bytes came"):
            far.read(row, 0)
        path.write_bytes(bytes(data) * 100)
        with pytest.raises(CorruptShardError, match=rf"{split.shards[1]}: more than the \d+ bytes"):
            far.read(row, 0)
    assert not [path for path in (tmp_path / "cache").rglob("*000001*") if path.suffix != ".lock"]


@pytest.mark.usefixtures("impatient")
def test_another_set_under_the_url_is_noticed(shard_set: Path, archive: tuple[Path, Path], tmp_path: Path) -> None:
    from shards.build import BuildOptions, build

    own = tmp_path / "own"
    shutil.copytree(shard_set, own)
    with serve(own) as server:
        before = ShardSet.open(server.url, NodeCache(root=tmp_path / "cache"))
        split = before.split("train")
        split.read(0, 0)
        shutil.rmtree(own)
        options = BuildOptions(size=64, samples_per_shard=7, split="train=0.6,val=0.2,test=0.2", seed=1)
        build(str(archive[0]), str(archive[1]), str(own), options)
        with pytest.raises(ShardSetError, match="another shard set lies there than when it was opened"):
            split.read(len(split) - 1, 0)
        after = ShardSet.open(server.url, NodeCache(root=tmp_path / "cache"))
        assert after.root != before.root
        assert after.split("train").read(0, 0)
