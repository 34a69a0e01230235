"""How sure a score is: its 95 % bootstrap interval over images."""

from __future__ import annotations

import numpy as np

from isicdist.metrics.dice import JACCARD_THRESHOLD, per_image_scores

RESAMPLES = 2000
NAMES = ("mean_dice", "pooled_dice", "mean_jaccard", "thresholded_jaccard")


def bootstrap_intervals(rows: np.ndarray, digest: str) -> dict[str, tuple[float, float]]:
    """Low and high end of the 95 % interval of each score, by name: percentiles of resampled sets of images.

    `rows` (n, 4) int64 of (id, TP, FP, FN), n at least 1. The resamples are a function of n and of `digest`, the
    shard set's (hex): the same model on the same data has the same interval, and two models are compared on the
    same resamples.
    """
    dice, jaccard = per_image_scores(rows)
    official = np.where(jaccard >= JACCARD_THRESHOLD, jaccard, 0)
    columns = np.stack([dice, jaccard, official, *rows[:, 1:].T.astype(np.float64)])  # (6, n)
    generator = np.random.default_rng(int(digest, 16))
    n = len(rows)
    sums = np.stack([columns[:, generator.integers(n, size=n)].sum(axis=1) for _ in range(RESAMPLES)])
    tp, fp, fn = sums[:, 3:].T
    lesion = 2 * tp + fp + fn
    pooled = np.where(lesion > 0, 2 * tp / np.where(lesion > 0, lesion, 1), 1)
    scores = (sums[:, 0] / n, pooled, sums[:, 1] / n, sums[:, 2] / n)  # in the order of NAMES
    low, high = np.quantile(np.stack(scores), (0.025, 0.975), axis=1).tolist()
    return {name: (least, most) for name, least, most in zip(NAMES, low, high, strict=True)}
