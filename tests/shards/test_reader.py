"""Reading samples of a local set by index."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from shards import format
from shards.errors import CorruptShardError, ShardSetError, UsageError
from shards.reader import ShardSet, Split


@pytest.fixture
def split(shard_set: Path) -> Split:
    return ShardSet.open(shard_set).split("val")


@pytest.fixture
def own(shard_set: Path, tmp_path: Path) -> Path:
    """A copy of the set that a test may damage."""
    return Path(shutil.copytree(shard_set, tmp_path / "set"))


def test_a_sample_is_decoded_into_given_arrays(split: Split):
    image, mask = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8)
    split.sample(3, image, mask)
    np.testing.assert_array_equal(image, split.image(3))
    np.testing.assert_array_equal(mask, split.mask(3))
    assert set(np.unique(mask)) == {0, 1}


def test_the_json_of_a_sample_has_its_key_and_original_size(split: Split):
    meta, original = split.meta(3), split.original_mask(3)
    assert original is not None
    assert (meta["key"], meta["height"], meta["width"]) == (split.key(3), *original.shape)


def test_train_has_no_original_masks(shard_set: Path):
    train = ShardSet.open(shard_set).split("train")
    assert train.original_mask(0) is None
    assert train.read(0, format.ORIGINAL) == b""


def test_shard_samples_counts_the_samples_of_each_shard(shard_set: Path):
    train = ShardSet.open(shard_set).split("train")
    assert train.shard_samples.tolist() == [entry.samples for entry in train.entries]
    assert train.shard_samples.sum() == len(train)


def test_a_local_set_shuffles_all_shards_and_needs_no_prefetch(split: Split):
    assert split.window is None
    advance = split.start_pass(np.arange(len(split)))
    advance(0)
    advance(len(split))
    assert split.read(0, format.IMAGE)


def test_a_missing_or_empty_shard_is_named(own: Path):
    split = ShardSet.open(own).split("val")
    path = own / split.shards[0]
    path.unlink()
    with pytest.raises(CorruptShardError, match="the shard is missing; copy it again") as missing:
        split.read(0, format.IMAGE)
    path.touch()
    with pytest.raises(CorruptShardError, match="the shard is empty; copy it again") as empty:
        split.read(0, format.IMAGE)
    assert missing.value.shard == empty.value.shard == split.shards[0]


def test_a_missing_or_damaged_table_is_named(own: Path):
    path = own / format.table_name("val")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptShardError, match="not the bytes that the index names") as damaged:
        ShardSet.open(own).split("val")
    assert damaged.value.shard == path.name
    path.unlink()
    with pytest.raises(ShardSetError, match="the sample table is missing"):
        ShardSet.open(own).split("val")


def test_a_split_that_the_set_does_not_have_is_refused(shard_set: Path):
    with pytest.raises(UsageError, match="no split 'holdout'; it has test, train, val"):
        ShardSet.open(shard_set).split("holdout")


def test_a_set_without_an_index_is_not_opened(own: Path):
    (own / format.INDEX_NAME).unlink()
    with pytest.raises(ShardSetError, match=r"no complete shard set \(no index.json\)"):
        ShardSet.open(own)


def test_the_resize_mode_is_that_of_the_build_or_an_error(own: Path):
    assert ShardSet.open(own).fit == "stretch"
    index = json.loads((own / format.INDEX_NAME).read_bytes())
    del index["built"]
    index["digest"] = format.digest_of(index)
    (own / format.INDEX_NAME).write_bytes(format.canonical_json(index))
    with pytest.raises(ShardSetError, match="does not say how the images were resized"):
        _ = ShardSet.open(own).fit
