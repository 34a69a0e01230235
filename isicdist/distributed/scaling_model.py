"""Scaling model: the time of a training step from measured rates, and the resource that bounds it.

Decoding runs on threads ahead of the device, so that a step takes the longer of the two; the all-reduce of the
gradients follows the last backward pass and overlaps with neither (`isicdist.distributed.gradients`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Bound = Literal["data", "compute", "network"]


def allreduce_seconds(bytes: int, world_size: int, bandwidth_bytes_per_s: float, latency_s: float) -> float:
    """Compute the time of a ring all-reduce of `bytes` over `world_size` ranks.

    Each rank sends 2 (n - 1) messages of 1/n of the buffer, one after the other. `bandwidth_bytes_per_s`: of one link
    in one direction; `latency_s`: of one message. 0 for one rank.
    """
    messages = 2 * (world_size - 1)
    return messages * (bytes / world_size / bandwidth_bytes_per_s + latency_s)


def allreduce_bandwidth(bytes: int, world_size: int, seconds: float, latency_s: float) -> float:
    """Compute the bandwidth of a link, in bytes per second, from a measured ring all-reduce: the inverse of the above.

    A measurement that is no longer than its latencies gives infinity, as one rank does.
    """
    messages = 2 * (world_size - 1)
    transfer = seconds - messages * latency_s
    return messages * bytes / world_size / transfer if messages and transfer > 0 else math.inf


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Measured rates of one rank, and of the link between ranks."""

    compute_images_per_s: float
    """Forward and backward passes of one device, images/s."""
    decode_images_per_s: float
    """Images that one thread reads and decodes per second."""
    decode_threads: int
    """Decoding threads of a rank."""
    gradient_bytes: int
    """Bytes of the buffer that is all-reduced once per step."""
    bandwidth_bytes_per_s: float
    """Of the slowest link, in one direction."""
    latency_s: float
    """Of one message."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Time of one optimizer step by its parts, in seconds."""

    data: float
    compute: float
    network: float

    @property
    def total(self) -> float:
        """Seconds of the step: decoding runs beside the device, the all-reduce after it."""
        return max(self.data, self.compute) + self.network

    @property
    def bound(self) -> Bound:
        """The part that takes longest, and so bounds the run; of equal parts compute, as it cannot be tuned away."""
        parts: dict[Bound, float] = {"compute": self.compute, "data": self.data, "network": self.network}
        return max(parts, key=lambda part: parts[part])


def step_time(rates: Rates, global_size: int, world_size: int) -> StepTime:
    """Predict a step of `global_size` samples over `world_size` ranks; the largest share of a rank decides."""
    share = math.ceil(global_size / world_size)
    return StepTime(
        data=share / (rates.decode_images_per_s * rates.decode_threads),
        compute=share / rates.compute_images_per_s,
        network=allreduce_seconds(rates.gradient_bytes, world_size, rates.bandwidth_bytes_per_s, rates.latency_s),
    )


def epoch_seconds(rates: Rates, samples: int, global_size: int, world_size: int) -> float:
    """Predict an epoch of `samples` training samples, without evaluation and checkpoints."""
    return math.ceil(samples / global_size) * step_time(rates, global_size, world_size).total


def threads_to_feed(rates: Rates) -> int:
    """Compute the decoding threads per rank that keep its device busy, at least 1."""
    return max(1, math.ceil(rates.compute_images_per_s / rates.decode_images_per_s))
