"""Every threshold at once: the same pixels as one threshold at a time, by brute force."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from isicdist.dice import DiceReduction
from isicdist.thresholds import BINS, ThresholdCurve, ThresholdReduction

ALL = torch.tensor([True, True])


def curve_of(logits: Tensor, masks: Tensor, valid: Tensor = ALL) -> ThresholdCurve:
    reduction = ThresholdReduction()
    reduction.update(logits, masks, torch.arange(len(logits)), valid)
    return reduction.reduce(Accelerator(cpu=True))


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    """Logits (2, 1, 61, 53) with every bin's edge, its two float32 neighbours and extremes among them; masks."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2 * 61 * 53, generator=generator)
    edges = torch.tensor([math.log(k / (BINS - k)) for k in range(1, BINS)])
    near = torch.cat([edges, edges.nextafter(torch.tensor(99.0)), edges.nextafter(torch.tensor(-99.0))])
    logits[: len(near)] = near
    logits[len(near) : len(near) + 4] = torch.tensor([math.inf, -math.inf, 200.0, -200.0])
    masks = (torch.rand(logits.shape, generator=generator) < logits.sigmoid()).to(torch.uint8)
    return logits.view(2, 1, 61, 53), masks.view(2, 1, 61, 53)


def test_each_threshold_counts_what_the_scores_count_there(batch):
    logits, masks = batch
    tp, fp, fn = curve_of(logits, masks).counts
    for k in range(1, BINS):
        reduction = DiceReduction(threshold=k / BINS)
        reduction.update(logits, masks, torch.arange(2))
        expected = reduction.reduce(Accelerator(cpu=True))
        assert [tp[k], fp[k], fn[k]] == expected.rows[:, 1:].sum(axis=0).tolist()
        assert curve_of(logits, masks).dice[k] == expected.pooled_dice
    assert tp[0] == masks.sum()  # every probability is above 0
    assert tp[0] + fp[0] == masks.numel()


def test_each_threshold_is_of_the_probability(batch):
    logits, masks = (tensor.flatten()[3 * BINS + 4 :] for tensor in batch)  # without those at an edge
    probs = logits.double().sigmoid()
    tp, fp, fn = curve_of(logits.view(1, 1, 1, -1), masks.view(1, 1, 1, -1), ALL[:1]).counts
    for k in range(BINS):
        predicted, lesion = probs > k / BINS, masks == 1
        assert tp[k] == (predicted & lesion).sum()
        assert fp[k] == (predicted & ~lesion).sum()
        assert fn[k] == (~predicted & lesion).sum()


def test_a_masked_place_is_not_counted(batch):
    logits, masks = batch
    one = curve_of(logits, masks, torch.tensor([False, True]))
    assert np.array_equal(one.on, curve_of(logits[1:], masks[1:], ALL[:1]).on)
    assert one.on.sum() + one.off.sum() == masks[1].numel()


def test_average_precision_and_the_best_threshold_by_hand():
    on, off = np.zeros(BINS, dtype=np.int64), np.zeros(BINS, dtype=np.int64)
    on[[10, 100, 200]] = 1, 4, 5
    off[[0, 100, 200]] = 30, 2, 1
    curve = ThresholdCurve(on=on, off=off)
    steps = Fraction(5, 10) * Fraction(5, 6) + Fraction(4, 10) * Fraction(9, 12) + Fraction(1, 10) * Fraction(10, 13)
    assert curve.average_precision == pytest.approx(float(steps), rel=1e-15)
    assert curve.best_threshold == 1 / BINS  # 20 / 23, up to 10/256; 18 / 22 beyond
    assert curve.summary()["best_pooled_dice"] == 20 / 23
    row = curve.table()[11]
    assert (row["threshold"], row["tp"], row["fp"], row["fn"]) == (11 / BINS, 9, 3, 1)
    assert (row["pooled_dice"], row["precision"], row["recall"]) == (18 / 22, 0.75, 0.9)


def test_calibration_error_is_small_where_probabilities_hold_and_large_where_they_do_not():
    total = np.full(BINS, 512, dtype=np.int64)
    on = 2 * np.arange(BINS, dtype=np.int64) + 1  # the bin's middle, exactly
    assert ThresholdCurve(on=on, off=total - on).calibration_error == 0
    assert ThresholdCurve(on=total - on, off=on).calibration_error == pytest.approx(0.5)


def test_no_lesion_anywhere_and_none_predicted_is_perfect():
    curve = curve_of(torch.full((2, 1, 3, 3), -9.0), torch.zeros(2, 1, 3, 3))
    assert curve.average_precision == 1.0
    assert curve.dice[128] == curve.jaccard[128] == 1.0
    assert curve.dice[0] == 0.0
