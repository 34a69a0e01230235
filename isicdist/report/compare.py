"""Compare runs: the settings that differ, and the paired bootstrap of the difference of mean Dice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from isicdist.config import flat_settings
from isicdist.metrics.bootstrap import PairedDifference, paired_difference
from isicdist.report.collect import PerImageScores, RunFiles

ABSENT = "–"
"""Stands for a setting that a run does not record."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting of several runs."""

    name: str
    """Its dotted name, as batch.global_size."""
    values: tuple[str, ...]
    """Its value in each run."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The mean Dice of one run compared with that of another on the images of one split."""

    split: str
    first: str
    """Name of the run that is compared with."""
    second: str
    """Name of the run whose difference is given."""
    resolution: str
    """original or network: where Dice was counted."""
    result: PairedDifference | None
    """At threshold 0.5; None where the runs cannot be compared."""
    obstacle: str
    """Reason why they cannot be; empty where they can."""


def differing_settings(runs: Sequence[RunFiles]) -> list[Setting]:
    """List the settings whose values are not the same in all runs, in the order of the first run's config."""
    flat = [flat_settings(run.config) for run in runs]
    names = dict.fromkeys(name for settings in flat for name in settings)
    settings = [Setting(name=name, values=tuple(_text(each.get(name)) for each in flat)) for name in names]
    return [setting for setting in settings if len(set(setting.values)) > 1]


def compare_runs(runs: Sequence[RunFiles]) -> list[Comparison]:
    """Compare each run with the first, on every split that both have evaluated."""
    first, *others = runs
    return [
        _compare(split, first, other) for split in first.evaluations for other in others if split in other.evaluations
    ]


def _compare(split: str, first: RunFiles, second: RunFiles) -> Comparison:
    evaluations = [run.evaluations[split] for run in (first, second)]
    use_original = all(each.per_image.original_dice is not None for each in evaluations)
    result, obstacle = None, _obstacle(split, (first, second), original=use_original)
    if not obstacle:
        scores = [each.per_image for each in evaluations]
        dice = [_aligned(each, each.original_dice if use_original else each.network_dice) for each in scores]
        grouped = min(scores, key=lambda each: len(set(each.groups)))  # older versions record no groups
        groups = _aligned(grouped, np.array(grouped.groups)).tolist()
        result = paired_difference(dice[0], dice[1], evaluations[0].summary.data_digest, groups)
    return Comparison(
        split=split,
        first=first.name,
        second=second.name,
        resolution="original" if use_original else "network",
        result=result,
        obstacle=obstacle,
    )


def _obstacle(split: str, runs: Sequence[RunFiles], *, original: bool) -> str:
    """Say why the scores of two runs on a split are not of the same images and masks in the same way, else nothing."""
    first, second = (run.evaluations[split] for run in runs)
    outdated = [run.name for run in runs if run.evaluations[split].summary in run.outdated]
    if outdated:
        return f"of an earlier model of {outdated[0]}; evaluate it again"
    if first.summary.tta != second.summary.tta:
        return f"test-time augmentation {first.summary.tta} and {second.summary.tta}"
    one, other = first.per_image, second.per_image
    if sorted(one.keys) != sorted(other.keys):
        return "evaluated on other images"
    # One key may be of a photograph in one set, and of a crop of it in another.
    lesions = [_aligned(each, each.original_lesions if original else each.network_lesions) for each in (one, other)]
    sizes = [_aligned(each, each.original_sizes) for each in (one, other)]
    same_masks = np.array_equal(lesions[0], lesions[1]) and np.array_equal(sizes[0], sizes[1])
    # At the network's resolution only one shard set has the same pixels.
    if not (same_masks and (original or first.summary.data_digest == second.summary.data_digest)):
        return "evaluated on other masks or photographs of these images"
    return ""


def _aligned(scores: PerImageScores, column: np.ndarray | None) -> np.ndarray:
    """Order a column (n, ...) by the keys of the images."""
    assert column is not None
    return column[np.argsort(scores.keys)]


def _text(value: Any) -> str:
    if value is None:
        return ABSENT
    return " to ".join(map(str, value)) if isinstance(value, list) else str(value)  # pyright: ignore[reportUnknownArgumentType]
