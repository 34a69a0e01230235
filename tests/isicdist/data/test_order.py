"""The order: exactly once, elastic, equal steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isicdist.data.order import MASKED, BatchPlan, Purpose, epoch_order, num_steps, random_keys, rank_slice, uniforms


@dataclass
class FakeIndex:
    counts: list[int]
    digest: str = "d"

    @property
    def shard_samples(self) -> np.ndarray:
        return np.array(self.counts, dtype=np.int64)


shards = st.lists(st.integers(0, 30), min_size=1, max_size=12)


@given(shards, st.integers(0, 9), st.integers(0, 9), st.none() | st.integers(1, 13))
def test_an_epoch_is_a_permutation(counts, seed, epoch, window):
    order = epoch_order(FakeIndex(counts), seed, epoch, window)
    assert sorted(order) == list(range(sum(counts)))


@given(shards, st.integers(1, 12))
def test_a_window_reads_its_shards_before_the_next(counts, window):
    order = epoch_order(FakeIndex(counts), 1, 2, window)
    shard_of = np.repeat(np.arange(len(counts)), counts)[order]
    seen = [s for i, s in enumerate(shard_of) if s not in shard_of[:i]]
    for number, shard in enumerate(seen):
        last_read = int(np.flatnonzero(shard_of == shard)[-1])
        # by the time a shard is finished, at most `window` non-empty shards beyond those before it are open
        opened = len(set(shard_of[: last_read + 1]))
        assert opened <= number + window


def test_the_order_depends_on_digest_seed_and_epoch_alone():
    one = epoch_order(FakeIndex([50, 50]), 3, 4)
    assert (one == epoch_order(FakeIndex([50, 50]), 3, 4)).all()
    for other in (
        epoch_order(FakeIndex([50, 50]), 3, 5),
        epoch_order(FakeIndex([50, 50]), 4, 4),
        epoch_order(FakeIndex([50, 50], digest="e"), 3, 4),
    ):
        assert (one != other).any()


def test_the_order_of_the_first_release_does_not_change():
    assert epoch_order(FakeIndex([4, 4]), 0, 0).tolist() == [6, 4, 1, 5, 0, 7, 3, 2]


@settings(max_examples=200)
@given(
    n=st.integers(1, 90),
    global_size=st.integers(1, 40),
    micro=st.integers(1, 9),
    world=st.integers(1, 16),
)
def test_ranks_read_every_sample_of_a_step_once(n, global_size, micro, world):
    order = epoch_order(FakeIndex([n]), 0, 0)
    plan = BatchPlan(global_size=global_size, micro_size=micro, world_size=world)
    read = []
    for step in range(num_steps(n, global_size)):
        slices = [rank_slice(order, step, plan, rank) for rank in range(world)]
        assert {s.shape for s in slices} == {(plan.accumulation_steps, micro)}  # equal forward passes
        counts = [int((s != MASKED).sum()) for s in slices]
        assert max(counts) - min(counts) <= 1
        got = np.concatenate([s[s != MASKED] for s in slices])
        alone = rank_slice(order, step, BatchPlan(global_size=global_size, micro_size=1, world_size=1), 0)
        assert sorted(got) == sorted(alone[alone != MASKED])  # elastic: the same step on any world
        assert len(got) == plan.samples_in_step(n, step)
        read.extend(got)
    assert len(set(read)) == len(read) == n


def test_a_plan_of_nothing_is_refused():
    with pytest.raises(ValueError, match="world_size is 0"):
        BatchPlan(global_size=1, micro_size=1, world_size=0)
    with pytest.raises(ValueError, match="window of 0"):
        epoch_order(FakeIndex([1, 1]), 0, 0, 0)


def test_keys_differ_by_every_argument_and_uniforms_are_uniform():
    numbers = np.arange(20_000)
    keys = random_keys(1, 2, numbers, Purpose.DROPOUT)
    assert len(set(keys.tolist())) == len(keys)
    for other in (
        random_keys(2, 2, numbers, Purpose.DROPOUT),
        random_keys(1, 3, numbers, Purpose.DROPOUT),
        random_keys(1, 2, numbers, Purpose.AUGMENT),
    ):
        assert not set(other.tolist()) & set(keys.tolist())
    u = uniforms(keys, 5)
    assert u.shape == (20_000, 5)
    assert u.min() >= 0
    assert u.max() < 1
    histogram = np.stack([np.histogram(lane, bins=20, range=(0, 1))[0] for lane in u.T])
    assert (abs(histogram - 1000) < 5 * 1000**0.5).all()
    assert (abs(np.corrcoef(u.T) - np.eye(5)) < 0.04).all()


def test_the_windows_of_the_first_release_do_not_change():
    index = FakeIndex([3, 2, 0, 3, 2])
    assert epoch_order(index, 0, 0, 2).tolist() == [8, 4, 3, 9, 6, 5, 7, 1, 0, 2]
    assert epoch_order(index, 0, 1, 2).tolist() == [0, 2, 1, 4, 3, 8, 9, 5, 6, 7]


def test_windows_hold_other_shards_each_epoch_and_are_shuffled_like_the_whole_set():
    counts = np.full(24, 30)
    shard_of, index = np.repeat(np.arange(24), counts), FakeIndex(counts.tolist())
    first_windows = set()
    for epoch in range(8):
        whole, windowed = (epoch_order(index, 0, epoch, window) for window in (None, 4))
        for start in range(0, 720, 120):
            window = windowed[start : start + 120]
            assert len(set(shard_of[window])) == 4  # the last window is the one that may be smaller
            assert window.tolist() == [sample for sample in whole if sample in set(window)]
        first_windows.add(frozenset(shard_of[windowed[:120]].tolist()))
    assert len(first_windows) == 8


@pytest.mark.parametrize("name", ["global_size", "micro_size", "world_size"])
def test_each_number_of_a_plan_is_at_least_1(name):
    with pytest.raises(ValueError, match=f"{name} is 0: it must be at least 1"):
        BatchPlan(**{"global_size": 4, "micro_size": 2, "world_size": 1, name: 0})
