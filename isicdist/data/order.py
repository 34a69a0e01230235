"""Which samples, in which order, on which rank: arithmetic and nothing else.

An epoch's order is a pure function of (index digest, seed, epoch). Step `s` trains on the next `global_size`
samples of it, whatever the world size is; ranks only slice them. Where a step has fewer samples than places (the
last step of an epoch, or a global batch that the world size does not divide) the places are masked, so that
every rank makes the same number of forward passes.

Random numbers have no state either: `random_keys` hashes (seed, counter, sample number, purpose).
"""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

Tail = Literal["mask", "drop"]

MASKED = -1
"""The sample number in a place that has no sample."""


class Index(Protocol):
    """What the order needs of a split: `shards.reader.Split` has it."""

    @property
    def digest(self) -> str:
        """Names the shard set."""
        ...

    @property
    def shard_samples(self) -> np.ndarray:
        """Samples in each shard, int64 (shards,)."""
        ...


class Purpose(enum.IntEnum):
    """What a random number is for. Two purposes never share one."""

    SHARD_ORDER = 1
    SAMPLE_ORDER = 2
    AUGMENT = 3
    DROPOUT = 4


def epoch_order(index: Index, seed: int, epoch: int, window: int | None = None) -> np.ndarray:
    """The order of one epoch: every sample number once, int64 (n,).

    Shards are permuted; then samples are shuffled within each run of `window` shards (None: the whole set, which
    costs nothing where the shards are local). A sample's number is its row in the split's table, shard by shard.
    """
    counts = np.asarray(index.shard_samples, dtype=np.int64)
    base = int.from_bytes(hashlib.sha256(f"{index.digest}/{seed}".encode()).digest()[:8], "little")
    # No two keys of an epoch are the same, so the fastest sort is as good as a stable one (`random_keys`).
    order = np.argsort(random_keys(base, epoch, np.arange(counts.sum()), Purpose.SAMPLE_ORDER)).astype(np.int64)
    if window is None or window >= len(counts):
        return order
    if window < 1:
        raise ValueError(f"a window of {window} shards: at least 1, or None for the whole set")
    shard_keys = random_keys(base, epoch, np.arange(len(counts)), Purpose.SHARD_ORDER)
    turn = np.empty(len(counts), dtype=np.min_scalar_type(len(counts) // window))  # small integers sort in O(n)
    turn[np.argsort(shard_keys)] = np.arange(len(counts)) // window
    return order[np.argsort(np.repeat(turn, counts)[order], kind="stable")]


def num_steps(samples: int, global_size: int, tail: Tail = "mask") -> int:
    """The steps of an epoch over `samples` samples: the last, shorter one counts unless `tail` is "drop"."""
    return samples // global_size if tail == "drop" else -(-samples // global_size)


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How a global batch is cut into ranks and micro batches; accumulation is derived, never chosen."""

    global_size: int
    """Samples of one step over all ranks: science."""
    micro_size: int
    """Samples of one forward pass on one rank: hardware."""
    world_size: int
    """Processes."""

    def __post_init__(self) -> None:
        for name in ("global_size", "micro_size", "world_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")

    @property
    def accumulation_steps(self) -> int:
        """Forward passes of one rank in one step."""
        per_rank = -(-self.global_size // self.world_size)
        return -(-per_rank // self.micro_size)

    def samples_in_step(self, samples: int, step: int) -> int:
        """The samples that step `step` of an epoch over `samples` samples trains on, over all ranks."""
        return max(0, min(self.global_size, samples - step * self.global_size))


def rank_slice(order: np.ndarray, step: int, plan: BatchPlan, rank: int) -> np.ndarray:
    """The sample numbers that `rank` reads at `step` of the epoch, int64 (accumulation_steps, micro_size).

    A global batch is dealt like cards, so that a short one is short by at most one sample on any rank.
    MASKED stands where a place has no sample.
    """
    batch = order[step * plan.global_size : (step + 1) * plan.global_size]
    mine = batch[rank :: plan.world_size]
    places = np.full(plan.accumulation_steps * plan.micro_size, MASKED, dtype=np.int64)
    places[: len(mine)] = mine
    return places.reshape(plan.accumulation_steps, plan.micro_size)


def random_keys(seed: int, counter: int, numbers: np.ndarray, purpose: Purpose) -> np.ndarray:
    """A 64-bit random key per sample, int64 of the shape of `numbers`.

    A pure function of its arguments (`counter` is an epoch or a step): three rounds of SplitMix64's finalizer
    (Steele et al., OOPSLA 2014), in each of which one more argument is mixed in. A round is a bijection, so the keys
    of different samples differ where all else is the same.
    """
    word = 0xFFFFFFFFFFFFFFFF
    state = _mix(np.uint64((seed * 0x9E3779B97F4A7C15 + int(purpose)) & word))
    state = _mix(state ^ np.uint64((counter * 0xD1B54A32D192ED03) & word))
    return _mix(state ^ np.asarray(numbers, dtype=np.int64).astype(np.uint64)).astype(np.int64)


def uniforms(keys: np.ndarray, count: int) -> np.ndarray:
    """`count` independent uniform numbers in [0, 1) per key, float64 (*keys.shape, count)."""
    lanes = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    bits = _mix(keys.astype(np.uint64)[..., None] ^ lanes)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: np.ndarray | np.uint64) -> np.ndarray:
    x = np.asarray(x)
    with np.errstate(over="ignore"):  # the arithmetic is modulo 2^64
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
