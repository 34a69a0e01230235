"""The arithmetic behind `isicdist doctor` and benchmarks/scaling.py."""

from __future__ import annotations

import dataclasses
import math

import pytest

from benchmarks import scaling
from isicdist.distributed.scaling_model import (
    Rates,
    allreduce_bandwidth,
    allreduce_seconds,
    epoch_seconds,
    step_time,
    threads_to_feed,
)

RATES = Rates(
    compute_images_per_s=1000.0,
    decode_images_per_s=300.0,
    decode_threads=4,
    gradient_bytes=12_800_000,
    bandwidth_bytes_per_s=1.25e9,  # 10 Gbit/s
    latency_s=50e-6,
)


def test_a_ring_sends_twice_the_buffer_less_one_share_and_one_rank_sends_nothing():
    assert allreduce_seconds(12_800_000, 1, 1e9, 1.0) == 0
    assert allreduce_seconds(8_000, 2, 1e3, 0.25) == pytest.approx(2 * (4.0 + 0.25))
    assert allreduce_seconds(8_000, 8, 1e3, 0.0) == pytest.approx(14.0)


@pytest.mark.parametrize("world_size", [2, 8, 64])
def test_a_measured_time_gives_back_its_bandwidth(world_size):
    seconds = allreduce_seconds(12_800_000, world_size, 1.25e9, 50e-6)
    assert allreduce_bandwidth(12_800_000, world_size, seconds, 50e-6) == pytest.approx(1.25e9)
    assert allreduce_bandwidth(12_800_000, world_size, 0.0, 50e-6) == allreduce_bandwidth(1, 1, 1.0, 0.0) == math.inf


@pytest.mark.parametrize(
    ("change", "world_size", "bound"),
    [
        ({}, 1, "compute"),
        ({"decode_threads": 3}, 1, "data"),
        ({}, 64, "network"),  # one sample per rank: 1 ms of compute, 26 ms of messages
        ({"bandwidth_bytes_per_s": 1e11, "latency_s": 1e-6}, 8, "compute"),
    ],
)
def test_the_longest_part_bounds_a_step(change, world_size, bound):
    assert step_time(dataclasses.replace(RATES, **change), 64, world_size).bound == bound


def test_an_epoch_is_its_steps_and_the_largest_share_decides():
    part = step_time(RATES, 64, 3)
    assert part.compute == pytest.approx(22e-3)  # 64 over 3 ranks: 22, 21, 21
    assert part.total == pytest.approx(max(22e-3, 22 / 1200) + part.network)
    assert epoch_seconds(RATES, 129, 64, 3) == pytest.approx(3 * part.total)
    assert epoch_seconds(RATES, 128, 64, 1) == pytest.approx(2 * 64e-3)
    assert threads_to_feed(RATES) == 4
    assert threads_to_feed(dataclasses.replace(RATES, compute_images_per_s=1.0)) == 1


def test_the_tables_on_paper_follow_from_a_device_and_a_link():
    device = scaling.Device(images_per_s=1000.0, step_overhead_s=0.0, min_step_s=0.016)
    slow = scaling.Link(name="slow", bandwidth_bytes_per_s=1e9, latency_s=0.0)
    # 64 images in 64 ms on one device; 4 images a step on 16 devices, which the host stretches to 16 ms, and the sum.
    expected = 0.064 / 16 / (0.016 + 30 / 16 * 0.0128)
    assert scaling.efficiency(device, slow, 12_800_000, 64, 16) == pytest.approx(expected)
    assert scaling.efficiency(device, slow, 12_800_000, 64, 1) == 1
    assert scaling.network_seconds(slow, 12_800_000, 8) < scaling.network_seconds(slow, 12_800_000, 16) / 100
    # 24 ms may be 5 % of a step of 480 ms, so 512 images on each of 16 devices.
    assert scaling.advice(device, slow, 12_800_000, 16).endswith("from a global batch of 8192 on")


def test_measured_steps_are_compared_with_the_model_within_their_round(capsys):
    numbers = {
        "step": {"images_per_s": 10.0},
        "decoding": {"images_per_s": 1e9},
        "all-reduce": {"bandwidth_bytes_per_s": 1e8, "latency_s": 0.0},
    }
    checks = [{"name": "python"}, *({"name": name, "numbers": each} for name, each in numbers.items())]
    rates = scaling.rates_of(checks, 20_000_000)
    slower = dataclasses.replace(rates, compute_images_per_s=5.0)
    rounds = [
        scaling.Round(rates=rates, seconds={1: 0.8, 2: 1.5}, other_cores=0.0),  # the model: 0.8, and 0.2 for the sum
        scaling.Round(rates=slower, seconds={1: 2.0, 2: 1.8}, other_cores=0.0),  # 1.6, and 0.2
    ]
    scaling.print_measured(rounds, 8)
    one, two, eight, _ = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert one == ["1", "8", "1.400", "1.200", "1.12 (1.00 to 1.25)", "1.000", "1.000"]
    assert two == ["2", "16", "1.650", "1.400", "1.25 (1.00 to 1.50)", "0.822", "0.844"]
    # 14 messages of an eighth of 0.2 s, after 0.8 s or 1.6 s.
    assert eight == ["8", "64", "-", "1.550", "-", "-", f"{(0.8 / 1.15 + 1.6 / 1.95) / 2:.3f}"]
