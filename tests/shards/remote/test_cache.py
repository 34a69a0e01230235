"""The node's cache of remote shards: one download for all processes, complete or not at all, within its limit."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import fsspec
import numpy as np
import pytest
from filelock import FileLock

from shards.errors import CorruptShardError, ShardSetError, UsageError
from shards.reader import ShardSet, Split
from shards.remote import cache as node_cache
from shards.remote.cache import NodeCache, evict
from tests.conftest import ROOT
from tests.faults.servers import Served, faulty, serve


@pytest.fixture
def served(shard_set: Path) -> Iterator[Served]:
    with serve(shard_set) as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> NodeCache:
    return NodeCache(root=tmp_path / "cache")


def files_of(cache: NodeCache) -> list[Path]:
    """The files of the cache, unfinished downloads included."""
    return sorted(path for path in cache.root.glob("*/**/*") if path.is_file() and path.suffix != ".lock")


def total(cache: NodeCache) -> int:
    """Bytes of all files, while some come and go."""
    sizes = {}
    for path in files_of(cache):
        with contextlib.suppress(FileNotFoundError):
            sizes[path.name.split(".")[0]] = path.stat().st_size  # counted once if it is being renamed
    return sum(sizes.values())


def read_all(split: Split, order: np.ndarray | None = None) -> dict[str, bytes]:
    """The image of every sample by its key, in one pass."""
    order = np.arange(len(split)) if order is None else order
    advance, images = split.start_pass(order), {}
    advance(0)
    for position, index in enumerate(order.tolist()):
        images[split.key(index)] = bytes(split.read(index, 0))
        advance(position + 1)
    return images


def read_on_a_process(url: str, root: Path, seed: int, out: str) -> None:
    split = ShardSet.open(url, NodeCache(root=root)).split("train")
    images = read_all(split, np.random.default_rng(seed).permutation(len(split)))
    Path(out).write_text(str(len(images)))


def test_a_remote_set_is_read_as_a_local_one(served: Served, cache: NodeCache, shard_set: Path) -> None:
    remote, local = ShardSet.open(served.url, cache), ShardSet.open(shard_set)
    assert remote.digest == local.digest
    for name in ("train", "val", "test"):
        assert read_all(remote.split(name)) == read_all(local.split(name))
    assert {n for path, n in served.requests.items() if path.endswith((".tar", ".npy"))} == {1}


def test_any_protocol_of_fsspec_will_do(cache: NodeCache, shard_set: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(shard_set), "/far", recursive=True)
    try:
        split, local = (ShardSet.open(location, cache).split("val") for location in ("memory://far", shard_set))
        assert read_all(split) == read_all(local)
        memory.rm("/far/train/000000.tar")
        with pytest.raises(ShardSetError, match=r"memory://far/train/000000.tar: there is no such file"):
            ShardSet.open("memory://far", cache).split("train").read(0, 0)
    finally:
        memory.rm("/far", recursive=True)


def test_several_processes_fetch_each_shard_once(served: Served, cache: NodeCache, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=read_on_a_process, args=(served.url, cache.root, rank, str(tmp_path / f"{rank}")))
        for rank in range(3)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    asked = {path: times for path, times in served.requests.items() if path != "/index.json"}
    assert len(asked) > 3
    assert set(asked.values()) == {1}


def test_shards_are_fetched_ahead_of_the_pass(served: Served, cache: NodeCache) -> None:
    split = ShardSet.open(served.url, cache).split("train")
    split.start_pass(np.arange(len(split)))(0)
    until = time.monotonic() + 20
    while not all((split.root / name).exists() for name in split.shards):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_the_cache_stays_under_its_limit(served: Served, tmp_path: Path, shard_set: Path) -> None:
    shards = [entry.bytes for entry in ShardSet.open(shard_set).split("train").entries]
    cache = NodeCache(root=tmp_path / "cache", max_bytes=2 * max(shards) + 4096)
    split, largest = ShardSet.open(served.url, cache).split("train"), 0
    assert cache.max_bytes < sum(shards)
    for _ in range(2):
        advance = split.start_pass(np.arange(len(split)))
        for index in range(len(split)):
            split.read(index, 0)
            largest = max(largest, total(cache))
            advance(index + 1)
    assert max(shards) < largest <= cache.max_bytes
    assert sum(served.requests[f"/{name}"] for name in split.shards) > len(shards)  # some have been evicted


def test_what_is_read_now_is_not_evicted(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_cache, "WAIT_FOR_ROOM_SECONDS", 0.2)
    split = ShardSet.open(served.url, NodeCache(root=tmp_path / "cache")).split("train")
    first, second = split.entries[:2]
    cache = NodeCache(root=tmp_path / "small", max_bytes=max(first.bytes, second.bytes) + 8192)
    split = ShardSet.open(served.url, cache).split("train")
    other = int(np.flatnonzero(split.table["shard"] == 1)[0])
    split.read(0, 0)
    with pytest.raises(UsageError, match=r"000001.tar needs \d+ more; give it more room \(--stream.cache-size\)"):
        split.read(other, 0)
    assert (split.root / first.name).exists()


def test_the_oldest_unused_copy_goes_first(served: Served, cache: NodeCache) -> None:
    split = ShardSet.open(served.url, cache).split("train")
    assert split.cached_set
    for shard in (0, 1, 2, 0):
        split.open_shard(shard).close()
    (split.root / "samples-train.npy").unlink()  # older than all of them
    full = NodeCache(root=cache.root, max_bytes=total(cache))
    assert full.reserve(split.root / "new.tar.1.part", 1)
    assert [(split.root / name).exists() for name in split.shards[:3]] == [True, False, True]


def test_a_limit_that_holds_no_window_is_refused(served: Served, tmp_path: Path) -> None:
    split = ShardSet.open(served.url, NodeCache(root=tmp_path / "cache", max_bytes=100_000)).split("train")
    by_turns = np.argsort(split.table["offset"], kind="stable")  # begins with every shard before it ends with any
    needed = 2 * sum(entry.bytes for entry in split.entries)
    with pytest.raises(UsageError, match=f"stream.cache_size is 100000: .* needs {needed} bytes"):
        split.start_pass(by_turns)


def test_a_killed_process_leaves_nothing_torn(served: Served, cache: NodeCache) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from shards.reader import ShardSet; from shards.remote.cache import NodeCache\n"
        "ShardSet.open(sys.argv[1], NodeCache(root=Path(sys.argv[2]))).split('train').read(0, 0)"
    )
    with faulty(served.url, 1, ("stall",), only=".tar", stall=30) as silent:
        reader = subprocess.Popen([sys.executable, "-c", code, silent.url, str(cache.root)], cwd=ROOT)
        until = time.monotonic() + 30
        while not any(".tar" in path.suffixes and path.stat().st_size for path in files_of(cache)):
            assert time.monotonic() < until
            time.sleep(0.01)
        reader.kill()
        reader.wait()
    assert [path.suffix for path in files_of(cache)] == [".npy", ".part"]
    bounded = NodeCache(root=cache.root, max_bytes=10**6)
    assert bounded.reserve(cache.root / "new.tar.1.part", 10**6)  # the unfinished download is evicted
    assert not files_of(cache)


def test_the_next_process_completes_what_a_killed_one_began(served: Served, cache: NodeCache, shard_set: Path) -> None:
    split = ShardSet.open(served.url, cache).split("train")
    entry = split.entries[0]
    path = split.root / entry.name
    path.parent.mkdir()
    path.with_name(f"{path.name}.{entry.bytes}.part").write_bytes(b"torn")
    split.open_shard(0).close()
    assert path.read_bytes() == (shard_set / entry.name).read_bytes()
    assert not [path for path in files_of(cache) if path.suffix == ".part"]


def test_a_full_disk_is_said(served: Served, cache: NodeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    split = ShardSet.open(served.url, cache).split("train")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert split.cached_set
    monkeypatch.setattr(split.cached_set.remote._filesystem, "get_file", full)
    with pytest.raises(ShardSetError, match=r"the disk has no room for train/000000.tar \(\d+ bytes\); make some"):
        split.read(0, 0)
    assert [path.suffix for path in files_of(cache)] == [".npy"]


def test_a_copy_of_the_wrong_size_is_fetched_anew(served: Served, cache: NodeCache) -> None:
    split = ShardSet.open(served.url, cache).split("train")
    split.open_shard(0).close()
    os.truncate(split.root / split.shards[0], 100)
    with split.open_shard(0) as file:
        assert os.fstat(file.fileno()).st_size == split.entries[0].bytes


def test_a_copy_that_has_gone_bad_is_fetched_by_the_next_run(served: Served, cache: NodeCache) -> None:
    split = ShardSet.open(served.url, cache).split("train")
    split.open_shard(0).close()
    path = split.root / split.shards[0]
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptShardError, match=rf"train/000000.tar: {split.key(0)}.jpg is corrupt"):
        split.read(0, 0)
    assert ShardSet.open(served.url, cache).split("train").read(0, 0)


@pytest.mark.filterwarnings("ignore:flock not supported")
@pytest.mark.parametrize("cause", ["not a folder", "no locks", "no locks left"])
def test_a_folder_that_cannot_be_used_is_explained(
    served: Served, cache: NodeCache, monkeypatch: pytest.MonkeyPatch, cause: str
) -> None:
    split = ShardSet.open(served.url, cache).split("train")
    if cause == "not a folder":
        (split.root / "train").touch()
    else:

        def fail(*_: object) -> None:
            number = errno.ENOSYS if cause == "no locks" else errno.ENOLCK
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("fcntl.flock", fail)
    with pytest.raises(ShardSetError, match=r"cache: downloads cannot be cached there \(.+\); set ISICDIST_CACHE"):
        split.read(0, 0)


def test_a_file_is_evicted_unless_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS grants an exclusive lock only on a file that is open for writing."""
    modes = []
    path, flock = tmp_path / "file", fcntl.flock

    def as_on_nfs(file: IO[bytes], operation: int) -> None:
        modes.append(file.writable())
        flock(file, operation)

    path.write_bytes(b"content")
    with path.open("rb") as file:
        flock(file, fcntl.LOCK_SH)
        monkeypatch.setattr(fcntl, "flock", as_on_nfs)
        assert not evict(path)
    assert path.read_bytes() == b"content"
    assert evict(path)
    assert not path.exists()
    assert evict(path)
    assert modes == [True, True]


def test_a_table_that_has_gone_bad_is_fetched_by_the_next_run(served: Served, cache: NodeCache) -> None:
    split = ShardSet.open(served.url, cache).split("train")
    path = split.root / "samples-train.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptShardError, match=r"samples-train.npy: not the bytes that the index names"):
        ShardSet.open(served.url, cache).split("train")
    assert len(ShardSet.open(served.url, cache).split("train")) == len(split)


def test_what_is_needed_next_is_not_evicted_and_a_download_counts_whole(cache: NodeCache) -> None:
    folder = cache.root / "digest" / "train"
    folder.mkdir(parents=True)
    for age, name in enumerate(("oldest", "older")):
        (folder / name).write_bytes(bytes(100))
        os.utime(folder / name, (age, age))
    full = NodeCache(root=cache.root, max_bytes=200)
    assert full.reserve(folder / "new.tar.100.part", 100, protected=[folder / "oldest"])
    assert sorted(path.name for path in files_of(cache)) == ["new.tar.100.part", "oldest"]
    with FileLock(folder / "new.tar.lock"):
        assert not full.reserve(folder / "newer.tar.1.part", 1, protected=[folder / "oldest"])
