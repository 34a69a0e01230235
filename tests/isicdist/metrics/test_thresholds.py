"""Every threshold at once: the same pixels as one threshold at a time, by brute force."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from isicdist.metrics.dice import DiceReduction
from isicdist.metrics.thresholds import BINS, ThresholdCurve, ThresholdReduction

ALL = torch.tensor([True, True])


def curve_of(probs: Tensor, masks: Tensor, valid: Tensor = ALL) -> ThresholdCurve:
    reduction = ThresholdReduction()
    reduction.update(probs, masks, torch.arange(len(probs)), valid)
    return reduction.reduce(Accelerator(cpu=True))


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    """Probabilities (2, 1, 61, 53) with every bin's edge, its two float32 neighbours, 0 and 1 among them; masks."""
    generator = torch.Generator().manual_seed(0)
    probs = (3 * torch.randn(2 * 61 * 53, generator=generator)).sigmoid()
    edges = torch.arange(BINS + 1) / BINS
    near = torch.cat([edges, edges.nextafter(torch.tensor(1.0)), edges.nextafter(torch.tensor(0.0))])
    probs[: len(near)] = near
    masks = (torch.rand(probs.shape, generator=generator) < probs).to(torch.uint8)
    return probs.view(2, 1, 61, 53), masks.view(2, 1, 61, 53)


def test_each_threshold_counts_what_the_scores_count_there(batch):
    probs, masks = batch
    curve = curve_of(probs, masks)
    tp, fp, fn = curve.counts
    for k in range(1, BINS):
        reduction = DiceReduction(threshold=k / BINS)
        reduction.update(probs, masks, torch.arange(2))
        expected = reduction.reduce(Accelerator(cpu=True))
        assert [tp[k], fp[k], fn[k]] == expected.rows[:, 1:].sum(axis=0).tolist()
        assert curve.dice[k] == expected.pooled_dice
        assert curve.jaccard[k] == tp[k] / (tp[k] + fp[k] + fn[k])
    assert tp[0] == masks.sum()  # at 0 every pixel is lesion, one of probability 0 too
    assert tp[0] + fp[0] == masks.numel()


def test_the_curve_is_that_of_every_pixel_taken_by_itself(batch):
    probs, masks = (tensor.flatten().numpy() for tensor in batch)
    curve = curve_of(*batch)
    bins = [max(0, math.ceil(Fraction(float(p)) * BINS) - 1) for p in probs]  # k/256 < p <= (k+1)/256
    lesions = int(masks.sum())
    precision, error = Fraction(), Fraction()
    for k in range(BINS):
        here = [int(mask) for place, mask in zip(bins, masks, strict=True) if place == k]
        above = [int(mask) for place, mask in zip(bins, masks, strict=True) if place >= k]
        assert (curve.on[k], curve.off[k]) == (sum(here), len(here) - sum(here))
        if here:
            precision += Fraction(sum(here), lesions) * Fraction(sum(above), len(above))
            error += abs(sum(here) - len(here) * Fraction(2 * k + 1, 2 * BINS))
    assert curve.average_precision == pytest.approx(float(precision), rel=1e-14)
    assert curve.calibration_error == pytest.approx(float(error / len(bins)), rel=1e-14)
    highest = max(curve.dice[1:])
    assert curve.dice[round(curve.best_threshold * BINS)] == highest


def test_an_invalid_slot_is_not_counted(batch):
    probs, masks = batch
    one = curve_of(probs, masks, torch.tensor([False, True]))
    assert np.array_equal(one.on, curve_of(probs[1:], masks[1:], ALL[:1]).on)
    assert one.on.sum() + one.off.sum() == masks[1].numel()


def test_nan_is_no_lesion_and_is_counted(batch):
    probs, masks = (tensor.clone() for tensor in batch)
    probs[:, :, 7] = math.nan
    curve = curve_of(probs, masks)
    assert curve.undefined == 2 * 53
    reduction = DiceReduction()
    reduction.update(probs, masks, torch.arange(2))
    tp, fp, fn = (int(counts[128]) for counts in curve.counts)
    assert [tp, fp, fn] == reduction.reduce(Accelerator(cpu=True)).rows[:, 1:].sum(axis=0).tolist()
    assert curve_of(*batch).undefined == 0


def test_average_precision_and_the_best_threshold_by_hand():
    on, off = np.zeros(BINS, dtype=np.int64), np.zeros(BINS, dtype=np.int64)
    on[[10, 100, 200]] = 1, 4, 5
    off[[0, 100, 200]] = 30, 2, 1
    curve = ThresholdCurve(on=on, off=off)
    steps = Fraction(5, 10) * Fraction(5, 6) + Fraction(4, 10) * Fraction(9, 12) + Fraction(1, 10) * Fraction(10, 13)
    assert curve.average_precision == pytest.approx(float(steps), rel=1e-15)
    assert curve.best_threshold == 10 / BINS  # 20 / 23, up to 10/256; 18 / 22 beyond
    assert curve.summary().best_pooled_dice == 20 / 23
    row = curve.table()[11]
    assert (row["threshold"], row["tp"], row["fp"], row["fn"]) == (11 / BINS, 9, 3, 1)
    assert (row["pooled_dice"], row["precision"], row["recall"]) == (18 / 22, 0.75, 0.9)


def test_of_thresholds_that_are_as_good_the_nearest_to_a_half_is_chosen():
    on, off = np.zeros(BINS, dtype=np.int64), np.zeros(BINS, dtype=np.int64)
    on[250], off[3] = 5, 5  # right from 4/256 to 250/256
    assert ThresholdCurve(on=on, off=off).best_threshold == 0.5
    on[200] = off[200] = 1  # above it a lesion pixel is lost, at it and below one pixel too many is found
    assert ThresholdCurve(on=on, off=off).best_threshold == 0.5
    assert ThresholdCurve(on=0 * on, off=0 * off).best_threshold == 0.5


def test_a_threshold_is_tuned_only_where_that_gains_more_than_noise():
    on, off = np.zeros(BINS, dtype=np.int64), np.zeros(BINS, dtype=np.int64)
    on[255], off[[130, 200]] = 10_000, (5, 50)  # pooled Dice 20000 / 20055 at 0.5, /20050 from 131/256, 1 from 201/256
    curve = ThresholdCurve(on=on, off=off)
    assert curve.best_threshold == 201 / BINS
    assert curve.tuned_threshold == 201 / BINS
    off[200] = 10
    assert ThresholdCurve(on=on, off=off).best_threshold == 201 / BINS
    assert ThresholdCurve(on=on, off=off).tuned_threshold == 0.5


def test_calibration_error_is_small_where_probabilities_hold_and_large_where_they_do_not():
    total = np.full(BINS, 512, dtype=np.int64)
    on = 2 * np.arange(BINS, dtype=np.int64) + 1  # the bin's middle, exactly
    assert ThresholdCurve(on=on, off=total - on).calibration_error == 0
    assert ThresholdCurve(on=total - on, off=on).calibration_error == pytest.approx(0.5)


def test_no_lesion_anywhere_and_none_predicted_is_perfect():
    curve = curve_of(torch.full((2, 1, 3, 3), 1e-4), torch.zeros(2, 1, 3, 3))
    assert curve.average_precision == 1.0
    assert curve.dice[128] == curve.jaccard[128] == 1.0
    assert curve.dice[0] == 0.0


def test_the_best_score_is_that_at_the_best_threshold():
    """At 0 every pixel is lesion: no threshold that a model could have."""
    summary = curve_of(torch.zeros(2, 1, 3, 3), torch.ones(2, 1, 3, 3)).summary()
    assert (summary.best_threshold, summary.best_pooled_dice) == (0.5, 0.0)


def test_the_table_has_the_pixels_of_each_bin():
    on, off = np.zeros(BINS, dtype=np.int64), np.zeros(BINS, dtype=np.int64)
    on[10], off[10] = 4, 3
    row = ThresholdCurve(on=on, off=off).table()[10]
    assert (row["bin_pixels"], row["bin_lesion_pixels"]) == (7, 4)
