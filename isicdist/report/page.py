"""The report as one HTML page: every style, script and picture is in the file, and it loads nothing."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment

from isicdist import __version__
from isicdist.metrics.dice import SCORE_NAMES
from isicdist.report.collect import CrossValidation, Evaluation, RunFiles
from isicdist.report.compare import compare_runs, differing_settings
from isicdist.report.gallery import Picture
from isicdist.report.plots import (
    Chart,
    calibration_chart,
    histogram_chart,
    learning_charts,
    lesion_size_chart,
    threshold_chart,
)
from isicdist.report.reproduce import evaluate_commands, train_command
from shards.data_uri import data_uri
from shards.html_page import template_environment

REFERENCE = {"mean_dice": 0.898, "mean_jaccard": 0.838, "thresholded_jaccard": 0.802}
"""Scores of the winner of ISIC 2018 Task 1 on the challenge's 1,000 test images."""


@dataclass(frozen=True, kw_only=True)
class SplitSection:
    """All runs on one split: their evaluations, charts and pictures."""

    split: str
    evaluations: dict[str, Evaluation]
    """By name of the run."""
    charts: list[Chart]
    pictures: dict[str, dict[str, list[Picture]]]
    """The worst, median and best images, by name of the run and by group; only runs that have them."""

    @classmethod
    def of(cls, split: str, evaluations: dict[str, Evaluation]) -> SplitSection:
        """Draw the evaluations of one split, by name of the run."""
        drawings = (threshold_chart, calibration_chart, histogram_chart, lesion_size_chart)
        return cls(
            split=split,
            evaluations=evaluations,
            charts=[draw(evaluations) for draw in drawings],
            pictures={
                name: _by_group([Picture.of(example) for example in evaluation.examples])
                for name, evaluation in evaluations.items()
                if evaluation.examples
            },
        )


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Speed and progress of a run's training, over its logged steps."""

    images_per_s: float
    """Median images per second, all processes together."""
    data_wait: float
    """Median share of the time spent waiting for data, 0 to 1."""
    skipped: int
    """Updates that were skipped because loss or gradient was not finite."""

    @classmethod
    def of(cls, run: RunFiles) -> Throughput:
        """Summarise the logged steps."""
        return cls(
            images_per_s=statistics.median(each.images_per_s for each in run.train),
            data_wait=statistics.median(each.data_wait for each in run.train),
            skipped=sum(each.skipped for each in run.train),
        )


def render_page(runs: Sequence[RunFiles], crossval: CrossValidation | None = None) -> str:
    """Render the page about one run or several, or about a cross-validation and the runs of its folds.

    Raises CheckpointError for a damaged file of an evaluation.
    """
    evaluations: dict[str, dict[str, Evaluation]] = {}
    if crossval:
        evaluations = {split: {"ensemble": found} for split, found in crossval.ensemble.items()}
    for run in runs:
        for split, evaluation in run.evaluations.items():
            evaluations.setdefault(split, {})[run.name] = evaluation
    compared = len(runs) > 1 and not crossval  # folds have no image in common
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            version=__version__,
            title=crossval.name if crossval else ", ".join(run.name for run in runs),
            runs=runs,
            crossval=crossval,
            sections=[SplitSection.of(split, found) for split, found in evaluations.items()],
            learning=learning_charts(runs),
            throughput={run.name: Throughput.of(run) for run in runs},
            compared=compared,
            differences=differing_settings(runs) if compared else [],
            comparisons=compare_runs(runs) if compared else [],
            score_names=SCORE_NAMES,
            reference=REFERENCE,
            train_command=train_command,
            evaluate_commands=evaluate_commands,
        )
    )


def _by_group(pictures: Sequence[Picture]) -> dict[str, list[Picture]]:
    groups: dict[str, list[Picture]] = {}
    for picture in pictures:
        groups.setdefault(picture.example.group, []).append(picture)
    return groups


def _words(name: str) -> str:
    return name.replace("_", " ")


def _svg_uri(svg: bytes) -> str:
    return data_uri(svg, "image/svg+xml")


def _environment() -> Environment:
    environment = template_environment("isicdist.report")
    environment.filters |= {
        "score": lambda value: f"{value:.3f}",
        "signed": lambda value: f"{value:+.4f}",
        "percent": lambda value: f"{value:.1%}",
        "words": _words,
        "svg_uri": _svg_uri,
        "pretty_json": lambda value: json.dumps(value, indent=1),
    }
    return environment
