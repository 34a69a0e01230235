"""Shuffling, sharding between ranks, and stateless random numbers: pure functions, without torch.

The order of an epoch is a pure function of (index digest, seed, epoch). Step `s` trains on the next `global_size`
samples of it for any world size; ranks only slice them, and cut their slice into micro batches (gradient
accumulation). Where a step has fewer samples than slots (the last step of an epoch, or a global batch that the world
size does not divide) slots are masked, so that every rank makes the same number of forward passes.

Random numbers have no state either: `random_keys` hashes (seed, epoch or step, sample index, purpose).
"""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np

MASKED = -1
"""Sample index of a slot without a sample."""


class ShardedSamples(Protocol):
    """The part of a split that its order depends on; `shards.reader.Split` implements it."""

    @property
    def digest(self) -> str:
        """Digest of the shard set."""
        ...

    @property
    def shard_samples(self) -> np.ndarray:
        """Number of samples of each shard, int64 (shards,)."""
        ...


class Purpose(enum.IntEnum):
    """Use of a random number: the same sample and step get independent numbers for each."""

    SHARD_ORDER = 1
    SAMPLE_ORDER = 2
    AUGMENT = 3
    DROPOUT = 4


def epoch_order(split: ShardedSamples, seed: int, epoch: int, window: int | None = None) -> np.ndarray:
    """Shuffle one epoch: a permutation of the sample indices, int64 (n,).

    Shards are permuted; then samples are shuffled within each window of `window` successive shards (None: all shards,
    which costs nothing where they are local). The index of a sample is its row in the split's table, shard by shard.
    Raises ValueError for a window below 1.
    """
    counts = np.asarray(split.shard_samples, dtype=np.int64)
    base = int.from_bytes(hashlib.sha256(f"{split.digest}/{seed}".encode()).digest()[:8], "little")
    # The keys of an epoch are distinct (`random_keys`), so that the sort need not be stable.
    order = np.argsort(random_keys(base, epoch, np.arange(int(counts.sum())), Purpose.SAMPLE_ORDER)).astype(np.int64)
    if window is None or window >= len(counts):
        return order
    if window < 1:
        raise ValueError(f"a window of {window} shards: at least 1, or None for the whole set")
    shard_keys = random_keys(base, epoch, np.arange(len(counts)), Purpose.SHARD_ORDER)
    window_of = np.empty(len(counts), dtype=np.min_scalar_type(len(counts) // window))  # small integers sort in O(n)
    window_of[np.argsort(shard_keys)] = np.arange(len(counts)) // window
    return order[np.argsort(np.repeat(window_of, counts)[order], kind="stable")]


def num_steps(samples: int, global_size: int) -> int:
    """Count the steps of an epoch over `samples` samples, a shorter last one included."""
    return ceil_div(samples, global_size)


def ceil_div(dividend: int, divisor: int) -> int:
    """Divide and round up."""
    return -(-dividend // divisor)


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Division of a global batch between ranks and into micro batches.

    `global_size` decides the result of training, `micro_size` its memory and speed only. The number of accumulation
    steps is derived from them: global_size <= micro_size × world_size × accumulation_steps.
    """

    global_size: int
    """Global batch size: samples of one step over all ranks."""
    micro_size: int
    """Micro batch size: samples of one forward pass on one rank."""
    world_size: int
    """Number of processes."""

    def __post_init__(self) -> None:
        for name in ("global_size", "micro_size", "world_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")

    @property
    def accumulation_steps(self) -> int:
        """Gradient accumulation steps: forward passes of one rank in one optimizer step."""
        return ceil_div(ceil_div(self.global_size, self.world_size), self.micro_size)

    def samples_in_step(self, samples: int, step: int) -> int:
        """Count the samples of step `step` of an epoch over `samples` samples, over all ranks."""
        return max(0, min(self.global_size, samples - step * self.global_size))


def rank_slice(order: np.ndarray, step: int, plan: BatchPlan, rank: int) -> np.ndarray:
    """Slice the order of an epoch: the sample indices of `rank` at `step`, int64 (accumulation_steps, micro_size).

    Ranks take the samples of a global batch in turn, so that no rank has two more than another. Slots without a
    sample are MASKED.
    """
    batch = order[step * plan.global_size : (step + 1) * plan.global_size]
    own = batch[rank :: plan.world_size]
    slots = np.full(plan.accumulation_steps * plan.micro_size, MASKED, dtype=np.int64)
    slots[: len(own)] = own
    return slots.reshape(plan.accumulation_steps, plan.micro_size)


def random_keys(seed: int, counter: int, indices: np.ndarray, purpose: Purpose) -> np.ndarray:
    """Hash (seed, counter, index, purpose) to a 64-bit random key for each sample, int64 of the shape of `indices`.

    `counter`: an epoch or a step. Three rounds of SplitMix64's finalizer (Steele et al., OOPSLA 2014) mix in one
    argument after the other. Each round is a bijection, so that the keys of a call are distinct where `indices` are.
    """
    word = 0xFFFFFFFFFFFFFFFF
    state = _mix64(np.uint64((seed * 0x9E3779B97F4A7C15 + int(purpose)) & word))
    state = _mix64(state ^ np.uint64((counter * 0xD1B54A32D192ED03) & word))
    return _mix64(state ^ np.asarray(indices, dtype=np.int64).astype(np.uint64)).astype(np.int64)


def uniforms(keys: np.ndarray, count: int) -> np.ndarray:
    """Draw `count` independent uniform numbers in [0, 1) for each key, float64 (*keys.shape, count)."""
    lanes = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    bits = _mix64(keys.astype(np.uint64)[..., None] ^ lanes)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix64(x: np.ndarray | np.uint64) -> np.ndarray:
    """Mix uint64 by a step and the finalizer of SplitMix64.

    Its values are not those of `isicdist.network.dropout._mix64_signed`, whose right shifts are arithmetic.
    """
    x = np.asarray(x)
    with np.errstate(over="ignore"):  # the arithmetic is modulo 2^64
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
