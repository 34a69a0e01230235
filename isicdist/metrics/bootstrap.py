"""Confidence intervals: the 95 % percentile bootstrap over images, of each score and of a paired difference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

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
    n = len(rows)
    sums = np.stack([columns[:, images].sum(axis=1) for images in _resamples(n, digest)])  # (R, 6)
    tp, fp, fn = sums[:, 3:].T
    scores = (sums[:, 0] / n, dice_of(tp, fp, fn), sums[:, 1] / n, sums[:, 2] / n)  # in the order of SCORE_NAMES
    lows, highs = np.quantile(np.stack(scores), QUANTILES, axis=1).tolist()
    return {name: (low, high) for name, low, high in zip(SCORE_NAMES, lows, highs, strict=True)}


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """The difference of a mean score between two models on the same images, second minus first."""

    n: int
    """Number of images."""
    difference: float
    interval_95: tuple[float, float]
    """(low, high) end of its 95 % bootstrap confidence interval."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read what `dataclasses.asdict` made. Raises KeyError, TypeError or ValueError for anything else."""
        low, high = map(float, value["interval_95"])
        return cls(n=int(value["n"]), difference=float(value["difference"]), interval_95=(low, high))

    @property
    def is_clear(self) -> bool:
        """True where the interval excludes 0: the images that were sampled do not explain the difference."""
        low, high = self.interval_95
        return low > 0 or high < 0


def paired_difference(first: np.ndarray, second: np.ndarray, digest: str) -> PairedDifference:
    """Compare two models by the paired bootstrap: each resample holds the same images for both.

    `first` and `second`: the score of each image, float64 (n,), in the same order; n at least 1. The resamples are
    those of `bootstrap_intervals` for the same n and `digest`. Pairing removes the variance between easy and difficult
    images, so the interval is narrower than two overlapping intervals suggest.
    Raises ValueError for two different numbers of images.
    """
    if first.shape != second.shape:
        raise ValueError(f"scores of {len(first)} and of {len(second)} images: pair them by image first")
    differences = second - first
    means = [differences[images].mean() for images in _resamples(len(differences), digest)]
    low, high = np.quantile(means, QUANTILES).tolist()
    return PairedDifference(n=len(differences), difference=float(differences.mean()), interval_95=(low, high))


def _resamples(n: int, digest: str) -> Iterator[np.ndarray]:
    """Draw RESAMPLES times n of n images with replacement, int64 (n,) each; `digest` (hex) is the seed."""
    generator = np.random.default_rng(int(digest, 16))
    for _ in range(RESAMPLES):
        yield generator.integers(n, size=n)
