"""Compare runs: the settings that differ, and the paired bootstrap of the difference of mean Dice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from isicdist.config import flat_settings
from isicdist.metrics.bootstrap import PairedDifference, paired_difference
from isicdist.report.collect import Evaluation, RunFiles

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
    """At threshold 0.5; None where the runs were evaluated on other images."""


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
    scores = [run.evaluations[split].per_image for run in (first, second)]
    use_original = all(each.original_dice is not None for each in scores)
    dice = [_dice_by_key(run.evaluations[split], original=use_original) for run in (first, second)]
    result = None
    # At the network's resolution only the same shard set gives both the same question.
    digests = {run.evaluations[split].summary.data_digest for run in (first, second)}
    same_masks = use_original or len(digests) == 1
    if dice[0].keys() == dice[1].keys() and same_masks:
        paired = [np.array([each[key] for key in dice[0]]) for each in dice]
        result = paired_difference(paired[0], paired[1], first.evaluations[split].summary.data_digest)
    return Comparison(
        split=split,
        first=first.name,
        second=second.name,
        resolution="original" if use_original else "network",
        result=result,
    )


def _dice_by_key(evaluation: Evaluation, *, original: bool) -> dict[str, float]:
    scores = evaluation.per_image
    dice = scores.original_dice if original and scores.original_dice is not None else scores.network_dice
    return dict(zip(scores.keys, dice.tolist(), strict=True))


def _text(value: Any) -> str:
    if value is None:
        return ABSENT
    return " to ".join(map(str, value)) if isinstance(value, list) else str(value)  # pyright: ignore[reportUnknownArgumentType]
