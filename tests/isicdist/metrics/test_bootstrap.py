"""Bootstrap confidence intervals: against one resample at a time, against theory, and deterministic."""

from __future__ import annotations

import math

import numpy as np
import pytest

from isicdist.metrics.bootstrap import RESAMPLES, bootstrap_intervals, paired_difference
from isicdist.metrics.dice import SCORE_NAMES, DiceSummary, per_image_scores

DIGEST = "5c89b6f2" * 8


def rows_of(n: int) -> np.ndarray:
    generator = np.random.default_rng(1)
    tp, fp, fn = generator.integers(300, 900, n), generator.integers(0, 200, n), generator.integers(0, 200, n)
    return np.stack([np.arange(n), tp, fp, fn], axis=1)


def test_it_is_the_percentiles_of_the_scores_of_resampled_images():
    rows = rows_of(9)
    rows[4, 1:] = 0  # empty, and rightly so: scores 1
    generator = np.random.default_rng(int(DIGEST, 16))
    resampled = [DiceSummary.of(rows[generator.integers(9, size=9)]) for _ in range(RESAMPLES)]
    for name, (low, high) in bootstrap_intervals(rows, DIGEST).items():
        values = np.sort([getattr(summary, name) for summary in resampled])
        assert values[49] - 1e-12 <= low <= values[50] + 1e-12
        assert values[1949] - 1e-12 <= high <= values[1950] + 1e-12


def test_many_images_come_close_to_the_normal_interval():
    rows = rows_of(400)
    dice, _ = per_image_scores(rows)
    low, high = bootstrap_intervals(rows, DIGEST)["mean_dice"]
    width = 2 * 1.96 * dice.std() / math.sqrt(len(rows))
    assert high - low == pytest.approx(width, rel=0.1)
    assert (low + high) / 2 == pytest.approx(dice.mean(), abs=width / 10)


def test_it_is_the_same_every_time_and_another_for_other_data():
    rows = rows_of(30)
    assert bootstrap_intervals(rows, DIGEST) == bootstrap_intervals(rows.copy(), DIGEST)
    assert bootstrap_intervals(rows, DIGEST) != bootstrap_intervals(rows, DIGEST[::-1])


def test_one_image_or_only_empty_ones_leave_no_doubt():
    summary = DiceSummary.of(rows_of(1))
    one = bootstrap_intervals(summary.rows, DIGEST)
    assert one == {name: (getattr(summary, name),) * 2 for name in SCORE_NAMES}
    empty = np.array([[0, 0, 0, 0], [1, 0, 0, 0]])
    assert set(bootstrap_intervals(empty, DIGEST).values()) == {(1.0, 1.0)}


def test_a_paired_difference_is_the_percentiles_of_the_resampled_differences():
    first, second = (np.random.default_rng(seed).random(9) for seed in (1, 2))
    generator = np.random.default_rng(int(DIGEST, 16))
    chosen = [generator.integers(9, size=9) for _ in range(RESAMPLES)]
    values = np.sort([second[images].mean() - first[images].mean() for images in chosen])
    found = paired_difference(first, second, DIGEST)
    assert (found.n, found.difference) == (9, pytest.approx(second.mean() - first.mean()))
    low, high = found.interval_95
    assert values[49] - 1e-12 <= low <= values[50] + 1e-12
    assert values[1949] - 1e-12 <= high <= values[1950] + 1e-12


def test_images_of_a_group_are_resampled_together():
    rows = rows_of(40)
    pairs = np.repeat(rows, 2, axis=0)  # each image twice: no more is known than of 40 images
    pairs[:, 0] = np.arange(80)
    groups = [f"lesion {number // 2}" for number in range(80)]
    for name, interval in bootstrap_intervals(rows, DIGEST).items():
        assert bootstrap_intervals(pairs, DIGEST, groups)[name] == pytest.approx(interval)
    low, high = bootstrap_intervals(pairs, DIGEST)["mean_dice"]
    grouped_low, grouped_high = bootstrap_intervals(pairs, DIGEST, groups)["mean_dice"]
    assert grouped_high - grouped_low == pytest.approx(math.sqrt(2) * (high - low), rel=0.15)
    assert bootstrap_intervals(rows, DIGEST, [str(number) for number in range(40)]) == bootstrap_intervals(rows, DIGEST)

    first, second = np.random.default_rng(1).random((2, 40))
    twice = paired_difference(np.repeat(first, 2), np.repeat(second, 2), DIGEST, groups)
    once = paired_difference(first, second, DIGEST)
    assert (twice.n, twice.groups) == (80, 40)
    assert twice.interval_95 == pytest.approx(once.interval_95)


def test_a_few_images_show_no_clear_difference():
    first = np.random.default_rng(1).random(19)
    assert paired_difference(first, first + 0.1, DIGEST).interval_95[0] > 0
    assert not paired_difference(first, first + 0.1, DIGEST).is_clear


def test_pairing_shows_a_small_difference_between_images_of_very_different_difficulty():
    generator = np.random.default_rng(1)
    first = generator.random(200)
    better = paired_difference(first, first + 0.01 + generator.normal(0, 0.01, 200), DIGEST)
    assert better.is_clear
    assert not paired_difference(first, generator.permutation(first), DIGEST).is_clear
    assert paired_difference(first, first, DIGEST).interval_95 == (0, 0)
    with pytest.raises(ValueError, match="scores of 200 and of 1 images"):
        paired_difference(first, first[:1], DIGEST)


def test_an_image_at_the_official_threshold_counts_in_the_interval_as_in_the_score():
    assert bootstrap_intervals(np.array([[0, 13, 4, 3]]), DIGEST)["thresholded_jaccard"] == (0.65, 0.65)


def test_a_model_that_is_worse_is_clearly_so():
    first = np.linspace(0.2, 0.9, 50)
    assert paired_difference(first, first - 0.01, DIGEST).is_clear
