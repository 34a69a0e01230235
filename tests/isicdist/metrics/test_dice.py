"""Dice: by hand, against fractions, and to the last bit on any number of processes."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from isicdist.metrics.dice import DiceReduction, DiceSummary, count, dice_of, jaccard_of, per_image_scores

WORKER = Path(__file__).parent / "dice_worker.py"


def rows_of(*rows: tuple[int, int, int, int]) -> np.ndarray:
    return np.array(rows, dtype=np.int64)


def test_scores_by_hand():
    summary = DiceSummary.of(rows_of((0, 6, 2, 2), (1, 0, 0, 0), (2, 0, 5, 0), (3, 13, 4, 3)))
    dice = [Fraction(12, 16), Fraction(1), Fraction(0), Fraction(26, 33)]
    jaccard = [Fraction(6, 10), Fraction(1), Fraction(0), Fraction(13, 20)]
    assert summary.n == 4
    assert summary.mean_dice == float(sum(dice) / 4)
    assert summary.mean_jaccard == float(sum(jaccard) / 4)
    assert summary.pooled_dice == 38 / (38 + 11 + 5)
    assert summary.thresholded_jaccard == (1 + 0.65) / 4  # 0.6 is below 0.65; 0.65 is not


def test_all_empty_is_one_and_none_is_refused():
    assert DiceSummary.of(rows_of((4, 0, 0, 0))).pooled_dice == 1.0
    with pytest.raises(ValueError, match="no image was counted"):
        DiceSummary.of(np.empty((0, 4), dtype=np.int64))


def test_counts_are_exact_beyond_what_float32_holds():
    side = 4200  # more than 2^24 pixels
    ones = torch.ones(1, 1, side, side, dtype=torch.bool)
    mask = ones.clone()
    mask[0, 0, 0, 0] = False
    assert count(ones, mask).tolist() == [[side * side - 1, 1, 0]]


def test_update_counts_as_a_loop_over_pixels_does():
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(3, 1, 9, 7, generator=generator)
    masks = (torch.rand(3, 1, 9, 7, generator=generator) > 0.6).to(torch.uint8)
    reduction = DiceReduction(expected=2)
    reduction.update(probs, masks, torch.tensor([5, 6, 7]), torch.tensor([True, False, True]))
    summary = reduction.reduce(Accelerator(cpu=True))
    for row, image in zip(summary.rows.tolist(), (0, 2), strict=True):
        pairs = [(bool(p > 0.5), bool(t)) for p, t in zip(probs[image].flatten(), masks[image].flatten(), strict=True)]
        assert row == [5 + image, pairs.count((True, True)), pairs.count((True, False)), pairs.count((False, True))]


@pytest.mark.parametrize("threshold", [0.25, 0.5, 0.9])
def test_a_pixel_is_lesion_above_the_threshold_and_not_at_it(threshold):
    probs = torch.tensor([0, threshold, 1]).view(1, 1, 1, 3)
    probs = torch.cat([probs, probs.nextafter(torch.tensor(1.0)), probs.nextafter(torch.tensor(0.0))])
    reduction = DiceReduction(threshold=threshold)
    reduction.update(probs, torch.ones_like(probs), torch.arange(3))
    assert reduction.reduce(Accelerator(cpu=True)).rows[:, 1].tolist() == [1, 2, 1]
    with pytest.raises(ValueError, match=r"threshold 1\.0: it must lie between 0 and 1"):
        DiceReduction(threshold=1.0)


def test_a_duplicate_counts_once_and_a_contradiction_is_refused():
    ones = torch.ones(2, 1, 2, 2)
    reduction = DiceReduction(expected=1)
    reduction.update(ones, ones, torch.tensor([3, 3]))
    assert reduction.reduce(Accelerator(cpu=True)).n == 1
    reduction.update(0 * ones[:1], ones[:1], torch.tensor([3]))
    with pytest.raises(RuntimeError, match="image 3 was counted twice"):
        reduction.reduce(Accelerator(cpu=True))


def test_a_missing_image_is_refused():
    with pytest.raises(RuntimeError, match="0 images were counted, but the split has 2"):
        DiceReduction(expected=2).reduce(Accelerator(cpu=True))


def test_scores_are_per_image():
    dice, jaccard = per_image_scores(rows_of((0, 1, 1, 0), (1, 0, 0, 0)))
    assert dice.tolist() == [2 / 3, 1.0]
    assert jaccard.tolist() == [0.5, 1.0]


def test_one_formula_serves_integers_and_arrays():
    counts = [(6, 2, 2), (0, 0, 0), (0, 5, 0), (2**40 + 1, 3, 2**39)]
    tp, fp, fn = np.array(counts).T
    assert dice_of(tp, fp, fn).tolist() == [dice_of(*each) for each in counts] == [12 / 16, 1, 0, dice_of(*counts[3])]
    assert jaccard_of(tp, fp, fn).tolist() == [jaccard_of(*each) for each in counts]
    assert dice_of(*counts[3]) == float(Fraction(2 * counts[3][0], 2 * counts[3][0] + sum(counts[3][1:])))
    assert jaccard_of(*counts[3]) == float(Fraction(counts[3][0], sum(counts[3])))
    assert type(dice_of(0, 0, 0)) is float


@pytest.mark.parametrize("value", [-1e-3, 1.001, -math.inf, math.inf])
def test_logits_are_refused_when_the_counts_are_reduced(value):
    probs = torch.rand(2, 1, 3, 3)
    reduction = DiceReduction()
    reduction.update(probs, probs > 0.5, torch.tensor([0, 1]))
    probs[1, 0, 2, 2] = value
    reduction.update(probs, probs > 0.5, torch.tensor([2, 3]))  # the device is not waited for here
    reduction.update(probs.clamp(0, 1), probs > 0.5, torch.tensor([4, 5]))
    with pytest.raises(ValueError, match=r"probs outside of \[0, 1\]: these look like logits; apply sigmoid"):
        reduction.reduce(Accelerator(cpu=True))


def test_zero_one_and_nan_are_no_logits():
    reduction = DiceReduction()
    reduction.update(torch.tensor([0, 1, math.nan]).view(3, 1, 1, 1), torch.ones(3, 1, 1, 1), torch.arange(3))
    assert reduction.reduce(Accelerator(cpu=True)).rows[:, 1].tolist() == [0, 1, 0]  # NaN is not above the threshold


def test_every_world_size_gives_the_same_bits(python, tmp_path):
    sizes = (11, 2)  # not divisible; smaller than the world, so that some ranks have no image at all
    done = python(WORKER, tmp_path, *sizes)
    assert done.returncode == 0, done.stderr
    seen = [json.loads((tmp_path / f"{world}.json").read_text()) for world in (1, 2, 3, 4)]
    assert [summary["n"] for summary in seen[0]] == list(sizes)
    assert seen[0] == seen[1] == seen[2] == seen[3]


def test_an_image_too_many_is_refused():
    ones = torch.ones(2, 1, 2, 2)
    reduction = DiceReduction(expected=1)
    reduction.update(ones, ones, torch.tensor([3, 4]))
    with pytest.raises(RuntimeError, match="2 images were counted, but the split has 1"):
        reduction.reduce(Accelerator(cpu=True))


def test_rows_are_sorted_by_id():
    assert DiceSummary.of(rows_of((7, 1, 0, 0), (2, 0, 1, 0))).rows[:, 0].tolist() == [2, 7]


def test_logits_on_another_rank_are_refused_on_this_one():
    class OfTwo(Accelerator):
        num_processes, process_index, device = 2, 0, torch.device("cpu")  # pyright: ignore

        def __init__(self) -> None:
            pass

        def reduce(self, tensor: torch.Tensor, reduction: str = "sum", scale: float = 1.0) -> torch.Tensor:
            return tensor + torch.tensor([[0, 1], [0, 1]])

    ones = torch.ones(1, 1, 2, 2)
    reduction = DiceReduction()
    reduction.update(ones, ones, torch.tensor([0]))
    with pytest.raises(ValueError, match="these look like logits"):
        reduction.reduce(OfTwo())
