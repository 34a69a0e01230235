"""Scores as tables on the console."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from isicdist.metrics.dice import SCORE_NAMES
from isicdist.metrics.pooled import PooledScores
from isicdist.metrics.summary import EnsembleSummary, EvaluationSummary, ResolutionScores, ThresholdSummary


def show_evaluation(summary: EvaluationSummary, console: Console) -> None:
    """Print an evaluation: scores with confidence intervals, scores by lesion area and subgroup, thresholds."""
    title = f"{summary.split}: {summary.images}, 95 % bootstrap confidence interval"
    console.print(_score_table(title, summary.by_threshold()))
    for caution in summary.cautions():
        console.print(f"note: {caution}", soft_wrap=True)
    if summary.without_excluded:
        excluded = summary.without_excluded
        title = f"Without the {len(excluded.keys)} of them that {excluded.table} excludes"
        console.print(_score_table(title, excluded.by_threshold()))
    if summary.ensemble:
        console.print(_ensemble_table(summary.ensemble))

    finest = list(summary.at_tuned.by_resolution())[-1]
    setting = f"{finest} resolution, threshold {summary.at_tuned.threshold:.4g}"
    areas = [(f"{part.least_area:.1%} to {part.largest_area:.1%}", part) for part in summary.lesion_area_quartiles]
    console.print(_group_table("lesion area", areas, setting))
    if summary.subgroups:
        groups = [(group.value or "(none)", group) for group in summary.subgroups.groups]
        console.print(_group_table(summary.subgroups.column, groups, setting))

    curve = summary.thresholds
    console.print(
        f"the model's own threshold is {summary.at_tuned.threshold:.4g}; here pooled Dice is best at "
        f"{curve.best_threshold:.4g} ({curve.best_pooled_dice:.4f}); average precision "
        f"{curve.average_precision:.4f}, calibration error {curve.calibration_error:.4f}",
        soft_wrap=True,
    )


def show_pooled(scores: Mapping[str, PooledScores], console: Console) -> None:
    """Print the pooled scores of all held-out images, and their spread over the folds."""
    first = next(iter(scores.values()))
    table = Table(
        title=f"{first.pooled.n} held-out images of {len(first.of_folds)} folds: 95 % interval, deviation over folds"
    )
    table.add_column("score")
    table.add_column("all images", justify="right")
    table.add_column("of a fold", justify="right")
    for setting, each in scores.items():
        table.add_section()
        table.add_row(setting, style="bold")
        for name in SCORE_NAMES:
            spread = f"{each.mean(name):.4f} ± {each.deviation(name):.4f}"
            table.add_row(name.replace("_", " "), _with_interval(each.pooled, name), spread)
    console.print(table)


def _score_table(title: str, scored: Sequence[ThresholdSummary]) -> Table:
    table = Table(title=title)
    table.add_column("score")
    for resolution in scored[0].by_resolution():
        table.add_column(f"{resolution} resolution", justify="right")
    for each in scored:
        table.add_section()
        table.add_row(f"threshold {each.threshold:.4g}", style="bold")
        for name in SCORE_NAMES:
            cells = (_with_interval(scores, name) for scores in each.by_resolution().values())
            table.add_row(name.replace("_", " "), *cells)
    return table


def _ensemble_table(ensemble: EnsembleSummary) -> Table:
    table = Table(title="Gain of the ensemble over each model in mean Dice: threshold 0.5, network resolution")
    table.add_column("model")
    for name in ("mean Dice alone", "gain", "95 % interval, paired"):
        table.add_column(name, justify="right")
    rows = [(each.run, each.mean_dice, each.gain) for each in ensemble.members]
    mean = math.fsum(each.mean_dice for each in ensemble.members) / len(ensemble.members)
    for run, dice, gain in (*rows, ("mean of the models", mean, ensemble.gain)):
        low, high = gain.interval_95
        table.add_row(run, f"{dice:.4f}", f"{gain.difference:+.4f}", f"{low:+.4f} to {high:+.4f}")
    return table


def _group_table(grouped_by: str, groups: Sequence[tuple[str, ResolutionScores]], setting: str) -> Table:
    table = Table(title=f"By {grouped_by}, {setting}")
    for name in (grouped_by, "n", *SCORE_NAMES):
        table.add_column(name.replace("_", "\n"), justify="right")
    for label, scores in groups:
        others = (f"{getattr(scores, name):.4f}" for name in SCORE_NAMES if name != "mean_dice")
        dice = _with_interval(scores, "mean_dice") if scores.has_enough_groups else f"{scores.mean_dice:.4f}"
        table.add_row(label, str(scores.n), dice, *others)
    return table


def _with_interval(scores: ResolutionScores, name: str) -> str:
    """Format a score with its confidence interval, where there is one."""
    if name not in scores.interval_95:
        return f"{getattr(scores, name):.4f}"
    low, high = scores.interval_95[name]
    return f"{getattr(scores, name):.4f} ({low:.4f} to {high:.4f})"
