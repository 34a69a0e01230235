"""The planned source: what a webdataset pipeline over it yields is what the stream yields."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader
from webdataset import filters
from webdataset.pipeline import DataPipeline
from webdataset.tariterators import group_by_keys, tar_file_expander

from isicdist.data.order import BatchPlan, epoch_order
from isicdist.data.planned_source import PlannedSource
from isicdist.data.stream import Stream
from shards import codecs
from shards.reader import ShardSet, Split


@pytest.fixture
def split(shard_set: Path) -> Split:
    return ShardSet.open(shard_set).split("train")


def decoded(sample: dict[str, Any]) -> tuple[str, np.ndarray, np.ndarray]:
    return sample["__key__"], codecs.decode_image(sample["jpg"]), codecs.decode_mask(sample["mask.png"])


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_webdataset_pipeline_over_the_plan_gives_the_samples_of_the_stream(split, world, workers):
    plan = BatchPlan(global_size=6, micro_size=3, world_size=world)
    for rank in range(world):
        source = PlannedSource(split, plan, rank, seed=5, epoch=1)
        pipeline = DataPipeline(source, filters.map(decoded), filters.batched(3))
        batches = iter(DataLoader(pipeline, batch_size=None, num_workers=workers))  # pyright: ignore[reportArgumentType]
        with Stream(split, plan, rank, seed=5) as stream:
            stream.epoch_number = 1
            for batch in stream.epoch():
                if not batch.valid.any():
                    continue
                keys, images, masks = next(batches)
                assert keys == [split.key(index) for index in batch.indices[batch.valid]]
                assert (np.asarray(images) == batch.images[batch.valid].permute(0, 2, 3, 1).numpy()).all()
                assert (np.asarray(masks) == batch.masks[batch.valid][:, 0].numpy()).all()
        assert next(batches, None) is None


def test_workers_that_are_not_forked_read_the_planned_order(split):
    split.image(0)  # maps a shard, and a map cannot be pickled
    source = PlannedSource(split, BatchPlan(global_size=6, micro_size=3, world_size=1), 0, seed=5)
    loader = DataLoader(source, batch_size=None, num_workers=1, multiprocessing_context="forkserver")
    assert [sample["__key__"] for sample in loader] == [split.key(index) for index in epoch_order(split, 5, 0)]


def test_persistent_workers_read_the_epoch_that_is_set(split):
    plan = BatchPlan(global_size=6, micro_size=3, world_size=1)
    source = PlannedSource(split, plan, 0, seed=5)
    loader = DataLoader(source, batch_size=None, num_workers=1, persistent_workers=True)
    for epoch in range(2):
        source.epoch = epoch
        order = epoch_order(split, seed=5, epoch=epoch)
        assert [sample["__key__"] for sample in loader] == [split.key(index) for index in order]


def test_a_planned_sample_is_what_webdataset_reads_from_the_tar(split):
    plan = BatchPlan(global_size=1, micro_size=1, world_size=1)
    planned = {sample["__key__"]: sample for sample in PlannedSource(split, plan, 0)}
    count = 0
    for name in split.shards:
        with (split.root / name).open("rb") as stream:
            url = f"{split.root}/{name}"
            for sample in group_by_keys(tar_file_expander([{"url": url, "stream": stream}])):
                assert planned[sample["__key__"]] == {name: sample[name] for name in sample if name != "__local_path__"}
                count += 1
    assert count == len(planned) == len(split)


def test_a_planned_pass_says_how_far_it_has_come(split, monkeypatch):
    said: list[int] = []
    monkeypatch.setattr(Split, "start_pass", lambda self, order: said.append)
    plan = BatchPlan(global_size=6, micro_size=3, world_size=1)
    assert len(list(PlannedSource(split, plan, 0))) == len(split)
    steps = -(-len(split) // 6)
    assert said == [*(6 * step for step in range(steps) for _ in range(2)), len(split)]
