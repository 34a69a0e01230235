"""The meter: throughput and the share of waiting, without the time of evaluations."""

from __future__ import annotations

import math
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


def test_masked_slots_and_skipped_steps_take_no_part():
    meter = TrainMeter(Accelerator(cpu=True))
    logits = torch.tensor([1e-3, 9.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    masks = torch.tensor([1, 0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    meter.add_micro_batch(logits, masks, torch.tensor([True, False]))
    for loss, skipped in ((2.0, False), (float("nan"), True), (4.0, False)):
        meter.add_step(torch.tensor(loss), torch.tensor(skipped), samples=1)
    measured = meter.compute()
    assert (measured.pooled_dice, measured.loss, measured.skipped) == (1.0, 3.0, 1)

    meter.add_micro_batch(0 * logits, masks, torch.tensor([True, True]))  # a probability of 0.5 is not above it
    meter.add_step(torch.tensor(float("inf")), torch.tensor(True), samples=1)
    measured = meter.compute()  # of what came since
    assert (measured.pooled_dice, measured.skipped) == (0.0, 1)
    assert math.isnan(measured.loss)
