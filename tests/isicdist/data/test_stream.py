"""The stream: every sample once on any world, resumable, and ended by a corrupt byte."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from isicdist.data.order import MASKED, BatchPlan, epoch_order
from isicdist.data.stream import Batch, Stream, StreamState
from isicdist.errors import CheckpointError
from shards import format, layout
from shards.errors import CorruptShardError, UsageError
from shards.reader import ShardSet, Split
from shards.remote.cache import NodeCache
from tests.faults.servers import serve


@pytest.fixture
def split(shard_set: Path) -> Split:
    return ShardSet.open(shard_set).split("train")


def open_stream(
    split: Split, world: int = 1, rank: int = 0, *, global_size: int = 6, micro: int = 2, **options: Any
) -> Stream:
    plan = BatchPlan(global_size=global_size, micro_size=micro, world_size=world)
    options.setdefault("seed", 5)
    return Stream(split, plan, rank, **options)


def read(stream: Stream, how: str) -> list[np.ndarray]:
    """The sample numbers of every batch."""
    batches: Iterator[Batch] = getattr(stream, how)()
    return [batch.indices.copy() for batch in batches]


def real(numbers: list[np.ndarray]) -> list[int]:
    """The sample numbers without the masked places."""
    joined = np.concatenate(numbers)
    return joined[joined != MASKED].tolist()


def decoders() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("decode")]


@pytest.mark.parametrize("how", ["epoch", "sequential_pass"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_together_read_every_sample_once(split, world, how):
    seen, batches = [], set()
    for rank in range(world):
        with open_stream(split, world, rank) as stream:
            numbers = read(stream, how)
        batches.add(len(numbers))
        seen += real(numbers)
    assert len(batches) == 1  # equal forward passes on every rank
    assert sorted(seen) == list(range(len(split)))


def test_a_step_has_the_same_samples_on_any_world(split):
    def steps(world: int) -> list[set[int]]:
        per_rank = []
        for rank in range(world):
            with open_stream(split, world, rank, micro=1) as stream:
                per_rank.append(np.concatenate(read(stream, "epoch")).reshape(stream.steps_per_epoch, -1))
        return [set(row.tolist()) - {MASKED} for row in np.concatenate(per_rank, axis=1)]

    assert steps(1) == steps(2) == steps(3)


def test_epochs_follow_one_another_in_different_orders(split):
    with open_stream(split) as stream:
        first, second = real(read(stream, "epoch")), real(read(stream, "epoch"))
    assert first != second
    assert sorted(first) == sorted(second)


def test_more_workers_than_samples_read_each_once(shard_set):
    val = ShardSet.open(shard_set).split("val")
    assert len(val) < 40
    with open_stream(val, workers=40, prefetch=9) as stream:
        assert real(read(stream, "sequential_pass")) == list(range(len(val)))


def test_a_batch_is_what_the_split_holds(split):
    with open_stream(split, global_size=8, micro=8) as stream:
        for batch in stream.epoch():
            assert batch.images.shape == (8, 3, 64, 64)
            assert batch.masks.shape == (8, 1, 64, 64)
            for place in np.flatnonzero(batch.valid):
                number = int(batch.indices[place])
                assert (batch.images[place].permute(1, 2, 0).numpy() == split.image(number)).all()
                assert (batch.masks[place, 0].numpy() == split.mask(number)).all()


def test_a_short_tail_is_masked_in_memory_that_was_full_before(split):
    left = len(split) % 8
    assert left
    with open_stream(split, global_size=8, micro=8, prefetch=1) as stream:
        short = 0
        for batch in stream.sequential_pass():
            assert batch.step_samples == batch.valid.sum()
            if batch.step_samples < 8:
                short = batch.step_samples
                assert (batch.indices[short:] == MASKED).all()
                assert not batch.images[short:].any()
                assert not batch.masks[short:].any()
                assert batch.images[:short].any()
        assert short == left


def test_a_step_has_its_micro_batches_and_counts_when_all_are_processed(split):
    with open_stream(split, world=2, rank=1, global_size=8, micro=2) as stream:
        number = 0
        for number, step in enumerate(stream.steps()):
            assert step.start["consumed"] == stream.consumed == number * 8
            micro_batches = iter(step)
            assert next(micro_batches).step_samples == step.samples
            assert stream.consumed == number * 8
            assert len(list(micro_batches)) == stream.plan.accumulation_steps - 1 == 1
        assert number + 1 == stream.steps_per_epoch
        assert (stream.epoch_number, stream.consumed) == (1, 0)


def test_a_step_is_repeated_from_its_start_in_other_micro_batches(split):
    """As training does after an out-of-memory error."""
    with open_stream(split, global_size=6, micro=6) as stream:
        steps = stream.steps()
        step = next(steps)
        before = np.concatenate([batch.indices.copy() for batch in step])
        stream.load_state_dict(step.start)
        stream.plan = dataclasses.replace(stream.plan, micro_size=2)
        steps = stream.steps()
        after = [batch.indices.copy() for batch in next(steps)]
    assert len(after) == 3
    assert np.concatenate(after).tolist() == before.tolist()


@pytest.mark.parametrize("steps", [2, 5, 7])
def test_a_stream_goes_on_where_a_state_stood(split, steps):
    """7 steps reach into the second epoch."""
    with open_stream(split) as stream:
        assert stream.steps_per_epoch == 5
        done, state, rest = 0, None, []
        for _ in range(2):
            for step in stream.steps():
                indices = [batch.indices.copy() for batch in step]
                rest += indices if done >= steps else []
                done += 1
                if done == steps:
                    state = json.loads(json.dumps(stream.state_dict()))
    assert state is not None
    with open_stream(split) as resumed:
        resumed.load_state_dict(state)
        again = read(resumed, "epoch")
        while resumed.epoch_number < 2:
            again += read(resumed, "epoch")
    assert np.array_equal(again, rest)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"digest": "other"}, "trained with digest other"),
        ({"seed": 6}, "trained with seed 6, this run has 5"),
        ({"consumed": 8}, "8 samples of the epoch are no whole number of steps of 6"),
    ],
)
def test_a_state_of_another_run_is_refused(split, changed, said):
    with open_stream(split) as stream:
        before = stream.state_dict()
        with pytest.raises(CheckpointError, match=said):
            stream.load_state_dict(cast(StreamState, {**before, **changed}))
        assert stream.state_dict() == before


def test_a_flipped_byte_ends_the_stream_and_is_named(shard_set, tmp_path):
    copy = tmp_path / "set"
    shutil.copytree(shard_set, copy)
    split = ShardSet.open(copy).split("train")
    number = 20
    row = split.table[number]
    start, size = layout.member_spans(int(row["offset"]), row["size"].tolist())[format.IMAGE]
    shard = split.shards[row["shard"]]
    data = bytearray((copy / shard).read_bytes())
    data[start + size // 2] ^= 1
    (copy / shard).write_bytes(data)

    seen: list[int] = []
    with open_stream(split) as stream, pytest.raises(CorruptShardError) as caught:
        seen.extend(number for batch in stream.sequential_pass() for number in batch.indices.tolist())
    assert shard in str(caught.value)
    assert split.key(number) in str(caught.value)
    assert seen == list(range(20))  # 20 is a multiple of the micro batch: nothing before it is lost
    assert not decoders()


def test_leaving_early_leaves_no_thread_behind(split):
    with open_stream(split, workers=3) as stream:
        for _ in stream.epoch():
            assert decoders()
            break
    assert not decoders()


def test_images_of_their_own_sizes_are_refused(split):
    with pytest.raises(UsageError, match="build a set for training with --size"):
        open_stream(dataclasses.replace(split, size=None))


def test_a_batch_is_not_overwritten_while_it_is_the_current_one(split, monkeypatch):
    prefetch, micro, filled = 3, 2, threading.Semaphore(0)
    sample = Split.sample

    def counted(self: Split, number: int, image: np.ndarray, mask: np.ndarray) -> None:
        sample(self, number, image, mask)
        filled.release()

    monkeypatch.setattr(Split, "sample", counted)
    with open_stream(split, global_size=micro, micro=micro, prefetch=prefetch) as stream:
        batches = stream.sequential_pass()
        for step in range(stream.steps_per_epoch - prefetch - 1):
            batch = next(batches)
            for _ in range(micro * (prefetch + 1 if step == 0 else 1)):  # until all that is ahead has been read
                assert filled.acquire(timeout=20)
            assert batch.indices.tolist() == [2 * step, 2 * step + 1]
            for place, number in enumerate(batch.indices):
                assert (batch.images[place].permute(1, 2, 0).numpy() == split.image(number)).all()


def test_what_a_slot_held_is_not_overwritten_by_the_next_pass(split):
    with open_stream(split, prefetch=2) as stream:
        *_, last = stream.epoch()
        held = [split.image(number) for number in last.indices[last.valid]]
        second = stream.epoch()  # nothing is read before it is asked for
        assert (last.images[last.valid].permute(0, 2, 3, 1).numpy() == held).all()
        first = next(second)
        for place in np.flatnonzero(first.valid):
            assert (first.images[place].permute(1, 2, 0).numpy() == split.image(first.indices[place])).all()


def test_the_first_batches_of_the_next_epoch_are_decoded_ahead(split, monkeypatch):
    read: list[int] = []
    sample = Split.sample

    def counted(self: Split, number: int, image: np.ndarray, mask: np.ndarray) -> None:
        read.append(number)
        sample(self, number, image, mask)

    monkeypatch.setattr(Split, "sample", counted)
    with open_stream(split, prefetch=2) as stream:
        for step in stream.steps():
            list(step)
        deadline = time.monotonic() + 20
        while len(read) < len(split) + 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        following = epoch_order(split, 5, 1)
        assert sorted(read[len(split) :]) == sorted(following[:4].tolist())
        stream.load_state_dict({**stream.state_dict(), "epoch": 3})  # and they are forgotten
        first = next(stream.epoch())
        assert first.indices[first.valid].tolist() == epoch_order(split, 5, 3)[: first.valid.sum()].tolist()


def test_slots_serve_every_pass(split):
    with open_stream(split, prefetch=2) as stream:
        memory = [{batch.images.data_ptr() for batch in stream.epoch()} for _ in range(3)]
        assert memory[0] == memory[1] == memory[2]
        assert len(memory[0]) == 3
        stream.plan = dataclasses.replace(stream.plan, micro_size=1)
        assert {len(batch.images) for batch in stream.epoch()} == {1}


def test_a_slot_is_not_in_use_twice_when_a_pass_is_left_while_workers_fill_it(split, monkeypatch):
    """The pass that follows decodes into the same memory: a worker that is late would spoil it."""
    begun, going, sample = threading.Event(), threading.Event(), Split.sample

    def late(self: Split, number: int, image: np.ndarray, mask: np.ndarray) -> None:
        if number == 2 and not begun.is_set():
            begun.set()
            assert going.wait(20)
        sample(self, number, image, mask)

    monkeypatch.setattr(Split, "sample", late)
    with open_stream(split, workers=2, prefetch=1) as stream:
        passed = stream.sequential_pass()
        next(passed)
        assert begun.wait(20)
        threading.Timer(0.2, going.set).start()
        passed.close()
        assert going.is_set()
        for batch in stream.sequential_pass():
            for place in np.flatnonzero(batch.valid):
                assert (batch.images[place].permute(1, 2, 0).numpy() == split.image(batch.indices[place])).all()


def test_another_window_in_the_middle_of_a_run_is_refused_unless_both_cover_the_set(split):
    with open_stream(split) as stream:
        state = stream.state_dict()
    refusal = r"with --stream\.window None, this run has 2"
    with open_stream(split, window=2) as other, pytest.raises(CheckpointError, match=refusal):
        other.load_state_dict(state)
    with open_stream(split, window=len(split.entries)) as same:
        same.load_state_dict(state)


def test_the_steps_that_are_left_are_those_of_the_epochs_that_are_left(split):
    with open_stream(split) as stream:
        steps = stream.steps()
        for left in (15, 14, 13):
            assert stream.steps_left(3) == left
            list(next(steps))
        assert stream.steps_left(0) == 0


def test_every_epoch_of_a_remote_set_reads_every_sample_once(shard_set, tmp_path):
    with serve(shard_set) as server:
        split = ShardSet.open(server.url, NodeCache(root=tmp_path)).split("train")
        with open_stream(split) as stream:
            for epoch in range(3):
                assert stream.epoch_number == epoch
                assert real(read(stream, "epoch")) == epoch_order(split, 5, epoch).tolist()


def test_a_stream_with_a_window_reads_window_by_window(split):
    with open_stream(split, window=2) as stream:
        stream.epoch_number = 1
        assert real(read(stream, "epoch")) == epoch_order(split, 5, 1, 2).tolist()


def test_a_pass_says_how_far_it_has_come(split, monkeypatch):
    """For a remote set, whose shards are fetched and released by it."""
    said: list[int] = []
    monkeypatch.setattr(Split, "start_pass", lambda self, order: said.append)
    with open_stream(split, global_size=6, micro=3) as stream:
        list(stream.sequential_pass())
        assert said == [0, *(6 * step for step in range(stream.steps_per_epoch) for _ in range(2)), len(split)]
        said.clear()
        stream.load_state_dict({**stream.state_dict(), "consumed": 12})
        next(stream.epoch())
        assert said[0] == 12


def test_the_epochs_of_a_remote_set_are_planned_one_at_a_time(shard_set, tmp_path):
    """The shards of the next one would take the room of those that are still read."""
    with serve(shard_set) as server:
        split = ShardSet.open(server.url, NodeCache(root=tmp_path)).split("train")
        planned: list[np.ndarray] = []
        start_pass = split.start_pass
        split.start_pass = lambda order: planned.append(order) or start_pass(order)  # pyright: ignore
        with open_stream(split, prefetch=4) as stream:
            read(stream, "epoch")
            assert [order.tolist() for order in planned] == [epoch_order(split, 5, 0).tolist()]


def test_the_samples_of_a_step_are_named_from_its_start(split):
    with open_stream(split, window=2) as stream:
        for number in (0, 1):
            starts, keys = [], []
            for step in stream.steps():
                starts.append(step.start)
                keys.append([split.key(index) for batch in step for index in batch.indices[batch.valid].tolist()])
            assert stream.epoch_number == number + 1
            assert [stream.step_sample_names(start) for start in starts] == keys


def test_a_step_without_its_samples_is_an_error_and_not_a_shorter_step(split, monkeypatch):
    whole = Stream._batches

    def cut(*words: Any) -> Iterator[Batch]:
        yield next(whole(*words))

    monkeypatch.setattr(Stream, "_batches", cut)
    with open_stream(split, global_size=6, micro=3) as stream, pytest.raises(RuntimeError, match="StopIteration"):
        list(stream.epoch())
