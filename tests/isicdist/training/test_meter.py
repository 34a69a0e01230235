"""The meter: throughput and the share of waiting, without the time of evaluations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from accelerate import Accelerator

from isicdist.data.stream import Batch
from isicdist.training import meter as module
from isicdist.training.meter import TrainMeter


def test_throughput_leaves_out_what_is_done_while_the_meter_is_paused(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    def batches() -> Iterator[Batch]:
        now[0] += 1  # decoding
        yield cast(Batch, object())

    meter = TrainMeter(Accelerator(cpu=True))
    for _ in range(2):
        for _ in meter.timed(batches()):
            now[0] += 3  # forward and backward
        meter.add_step(torch.tensor(0.5), torch.tensor(False), samples=16)
        with meter.paused():
            now[0] += 100
    measured = meter.compute()
    assert measured.images_per_s == 2 * 16 / (2 * (1 + 3))
    assert measured.data_wait == 1 / 4
