"""Bits that flip and files that are cut short: whatever reads them says so, and nobody trains on what it reads."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from isicdist.config import ModelConfig
from isicdist.data.decoded_cache import DecodedCache
from isicdist.errors import CheckpointError
from isicdist.network.best import ModelMetadata, ValidationScore, load_best, save_best
from isicdist.network.unet import ImprovedUNet
from isicdist.training import checkpoint
from shards import format, layout
from shards.errors import CorruptShardError, ShardSetError
from shards.reader import ShardSet, Split
from shards.verify import verify
from tests.faults.conftest import Tally, times
from tests.isicdist.data.test_decoded_cache import read_epoch
from tests.isicdist.training.test_checkpoint import save

FLIPS, CUTS = times(1000, 60), times(300, 20)
OTHER_FLIPS, OTHER_CUTS = times(300, 40), times(100, 10)


@pytest.fixture
def own(shard_set: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shard_set, tmp_path / "set"))


def content(split: Split) -> dict[tuple[str, str], bytes]:
    """The bytes of every member, read as training reads them."""
    return {
        (split.key(index), name): bytes(split.read(index, member))
        for index in range(len(split))
        for member, name in enumerate(format.MEMBERS)
    }


def flips(data: bytes, number: int, seed: int) -> Iterator[bytes]:
    """Copies of the data with one bit flipped each."""
    chosen = random.Random(seed)
    for _ in range(number):
        damaged = bytearray(data)
        damaged[chosen.randrange(len(data))] ^= 1 << chosen.randrange(8)
        yield bytes(damaged)


def cuts(data: bytes, number: int, seed: int, always: Iterable[int] = ()) -> Iterator[bytes]:
    """Copies of the data that end too early: at the given offsets, and at random ones."""
    chosen = random.Random(seed)
    offsets = sorted(always)[:number]
    yield from (
        data[:offset] for offset in offsets + [chosen.randrange(len(data)) for _ in range(number - len(offsets))]
    )


def test_a_damaged_shard_is_found_when_it_is_read_or_nothing_of_a_sample_is_damaged(own: Path, tally: Tally):
    split = ShardSet.open(own).split("train")
    whole, path = content(split), own / split.shards[0]
    keys, data = {key for key, _ in whole}, path.read_bytes()
    spans = [
        layout.member_spans(int(row["offset"]), row["size"].tolist()) for row in split.table[split.table["shard"] == 0]
    ]
    boundaries = {edge for sample in spans for start, size in sample if size for edge in (start, start + size)}
    found = 0
    for damaged in (*flips(data, FLIPS, 0), *cuts(data, CUTS, 1, boundaries - {0, len(data)})):
        path.write_bytes(damaged)
        error, read = None, {}
        try:
            read = content(ShardSet.open(own).split("train"))
        except CorruptShardError as caught:
            error = caught
        if error:
            assert error.shard == split.shards[0]
            assert error.key in keys
            found += 1
        else:
            assert read == whole  # in a header or a padding of the tar, which reading does not use
        assert verify(own).faults
    assert found > (FLIPS + CUTS) // 2
    tally("shards: bits flipped", FLIPS)
    tally("shards: cut short", CUTS)


@pytest.mark.parametrize("name", ["index", "table"])
def test_a_damaged_index_or_table_is_found_when_it_is_opened(own: Path, tally: Tally, name: str):
    whole = content(ShardSet.open(own).split("train"))
    path = own / (format.INDEX_NAME if name == "index" else format.table_name("train"))
    data = path.read_bytes()
    for damaged in (*flips(data, OTHER_FLIPS // 2, 2), *cuts(data, OTHER_CUTS // 2, 3)):
        path.write_bytes(damaged)
        with pytest.raises(ShardSetError):
            content(ShardSet.open(own).split("train"))
    path.write_bytes(data)
    assert content(ShardSet.open(own).split("train")) == whole
    tally("index and sample tables: bits flipped", OTHER_FLIPS // 2)
    tally("index and sample tables: cut short", OTHER_CUTS // 2)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, tally: Tally):
    save(tmp_path, 1, 2)
    folder = tmp_path / "checkpoints" / "step-00000002"
    files = sorted(folder.iterdir())
    for number, path in enumerate(files):
        data = path.read_bytes()
        share = -(-OTHER_FLIPS // len(files)), -(-OTHER_CUTS // len(files))
        for damaged in (*flips(data, share[0], number), *cuts(data, share[1], number)):
            path.write_bytes(damaged)
            warnings: list[str] = []
            found = checkpoint.newest(tmp_path, warnings.append)
            assert found is not None
            assert (found.path.name, len(warnings)) == ("step-00000001", 1)
        path.write_bytes(data)
        tally("checkpoints: bits flipped", share[0])
        tally("checkpoints: cut short", share[1])
    found = checkpoint.newest(tmp_path, lambda text: None)
    assert found is not None
    assert found.path == folder


def test_a_damaged_best_model_is_refused(tmp_path: Path, shard_set: Path, tally: Tally):
    metadata = ModelMetadata.of(
        ModelConfig(base_channels=2), ShardSet.open(shard_set), step=3, score=ValidationScore(mean_dice=0.5)
    )
    save_best(tmp_path, ImprovedUNet(base_channels=2), metadata)
    _, whole = load_best(tmp_path)
    for number, path in enumerate(sorted((tmp_path / "best").iterdir())):
        data = path.read_bytes()
        for damaged in (*flips(data, OTHER_FLIPS // 2, number), *cuts(data, OTHER_CUTS // 2, number)):
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError):
                load_best(tmp_path)
        path.write_bytes(data)
        tally("best model: bits flipped", OTHER_FLIPS // 2)
        tally("best model: cut short", OTHER_CUTS // 2)
    assert load_best(tmp_path)[1] == whole
    card = json.loads((tmp_path / "best" / "model.json").read_text())
    del card["checksum"]  # as older versions wrote it
    (tmp_path / "best" / "model.json").write_text(json.dumps(card))
    assert load_best(tmp_path)[1] == whole


def test_a_damaged_decoded_cache_is_decoded_again(shard_set: Path, tmp_path: Path, tally: Tally):
    split = ShardSet.open(shard_set).split("train")
    without = read_epoch(split, None)
    cache = DecodedCache(split, tmp_path)
    assert read_epoch(split, cache) == without
    data = cache.path.read_bytes()
    flipped, cut = times(300, 8), times(100, 4)
    for damaged in (*flips(data, flipped, 4), *cuts(data, cut, 5)):
        cache.path.write_bytes(damaged)
        assert read_epoch(split, DecodedCache(split, tmp_path)) == without
    tally("decoded cache: bits flipped", flipped)
    tally("decoded cache: cut short", cut)
