"""Confidence intervals: the 95 % percentile bootstrap of each score over images."""

from __future__ import annotations

import numpy as np

from isicdist.metrics.dice import JACCARD_THRESHOLD, SCORE_NAMES, dice_of, per_image_scores

RESAMPLES = 2000
QUANTILES = (0.025, 0.975)
"""Ends of the confidence interval: 95 % of the resampled scores lie between them."""


def bootstrap_intervals(rows: np.ndarray, digest: str) -> dict[str, tuple[float, float]]:
    """Compute the 95 % confidence interval (low, high) of each score, by name, from resampled sets of images.

    `rows` (n, 4) int64 of (id, TP, FP, FN), n at least 1. The resamples are a function of n and of `digest`, the
    shard set's (hex): the same model on the same data has the same interval, and two models are compared on the
    same resamples.
    """
    dice, jaccard = per_image_scores(rows)
    official = np.where(jaccard >= JACCARD_THRESHOLD, jaccard, 0)
    columns = np.stack([dice, jaccard, official, *rows[:, 1:].T.astype(np.float64)])  # (6, n)
    generator = np.random.default_rng(int(digest, 16))
    n = len(rows)
    sums = np.stack([columns[:, generator.integers(n, size=n)].sum(axis=1) for _ in range(RESAMPLES)])  # (R, 6)
    tp, fp, fn = sums[:, 3:].T
    scores = (sums[:, 0] / n, dice_of(tp, fp, fn), sums[:, 1] / n, sums[:, 2] / n)  # in the order of SCORE_NAMES
    lows, highs = np.quantile(np.stack(scores), QUANTILES, axis=1).tolist()
    return {name: (low, high) for name, low, high in zip(SCORE_NAMES, lows, highs, strict=True)}
