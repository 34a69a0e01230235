"""What an evaluation comes to: scores with their intervals and subgroups, as files and as tables to read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from rich.console import Console
from rich.table import Table

from isicdist.config import Tta
from isicdist.metrics.bootstrap import NAMES, bootstrap_intervals
from isicdist.metrics.dice import DiceSummary, per_image_scores
from isicdist.metrics.thresholds import ThresholdCurve
from shards.errors import UsageError
from shards.files import write_file
from shards.geometry import ResizePlan
from shards.reader import Split
from shards.tables import csv_bytes, read_column_of

SUMMARY_NAME, PER_IMAGE_NAME, THRESHOLDS_NAME = "summary.json", "per_image.csv", "thresholds.csv"
RESOLUTIONS = ("network_resolution", "original_resolution")


@dataclass(frozen=True, kw_only=True)
class Subgroups:
    """What a column of a table says of the images."""

    column: str
    """The column's name."""
    values: Mapping[str, str]
    """Its value by image key; images it does not name have the value ""."""

    @classmethod
    def read(cls, spec: str, split: Split) -> Self:
        """The subgroups of FILE.csv:COLUMN. Raises UsageError when it is not there, or names no image of the split."""
        column, values = read_column_of(spec, "--metadata", "sex")
        if not any(split.key(number) in values for number in range(len(split))):
            raise UsageError(f"--metadata {spec}: it names none of the images; is it another set's table?")
        return cls(column=column, values=values)


@dataclass(frozen=True, kw_only=True)
class ThresholdScores:
    """The counts of one model on one split at one threshold."""

    threshold: float
    """Of the probability: above it a pixel is lesion."""
    network: DiceSummary
    """At the size the network sees."""
    original: DiceSummary | None
    """At each image's own size; None where the split does not carry the original masks."""

    @property
    def finest(self) -> DiceSummary:
        """At the original size where there is one, else at the network's."""
        return self.original or self.network

    def summary(self, digest: str) -> dict[str, Any]:
        """The scores with their intervals by resolution; `digest` is the shard set's."""
        blocks = {
            name: {**found.scores(), "interval_95": bootstrap_intervals(found.rows, digest)} if found else None
            for name, found in zip(RESOLUTIONS, (self.network, self.original), strict=True)
        }
        return {"threshold": self.threshold, **blocks}


@dataclass(frozen=True, kw_only=True)
class Results:
    """What one model comes to on one split."""

    split: Split
    step: int
    """The step the model is of."""
    tta: Tta
    """Which mirrored and turned copies the probabilities are the mean of."""
    half: ThresholdScores
    """At 0.5, the threshold that models are compared at."""
    own: ThresholdScores
    """At the model's own threshold, chosen on the validation split: the masks that a prediction draws."""
    curve: ThresholdCurve
    """At every threshold, pixels pooled, at the size the network sees."""
    subgroups: Subgroups | None = None
    """What else the images are told apart by."""

    @cached_property
    def original_sizes(self) -> np.ndarray:
        """(height, width) of each original in pixels, int64 (n, 2), in the order of the rows."""
        numbers = self.own.network.rows[:, 0].tolist()
        return np.array([ResizePlan.from_json(self.split.meta(number)["fit"]).original for number in numbers])

    @cached_property
    def lesion_areas(self) -> np.ndarray:
        """Share of each image that is lesion, 0 to 1, float64 (n,): of the original where its mask is there."""
        lesion = self.own.finest.rows[:, [1, 3]].sum(axis=1)
        if self.own.original:
            return lesion / self.original_sizes.prod(axis=1)
        assert self.split.size is not None
        return lesion / self.split.size**2

    def summary(self) -> dict[str, Any]:
        """What summary.json holds. The scores at the top are those at 0.5 and the network's resolution."""
        return {
            "split": self.split.name,
            "data_digest": self.split.digest,
            "resolution": self.split.size,
            "model_step": self.step,
            "tta": self.tta,
            **self.half.network.scores(),
            **self.half.summary(self.split.digest),
            "own_threshold": self.own.summary(self.split.digest),
            "thresholds": self.curve.summary(),
            "lesion_area_quartiles": list(self._quartiles()),
            "subgroups": self._by_value(self.subgroups) if self.subgroups else None,
        }

    def write(self, out: Path) -> None:
        """Write summary.json, per_image.csv and thresholds.csv into the folder `out`."""
        out.mkdir(parents=True, exist_ok=True)
        _write_csv(out / PER_IMAGE_NAME, self._per_image())
        _write_csv(out / THRESHOLDS_NAME, self.curve.table())
        write_file(out / SUMMARY_NAME, json.dumps(self.summary(), indent=1).encode() + b"\n")

    def _quartiles(self) -> Iterable[dict[str, Any]]:
        """The images in four parts of (nearly) the same number, from the smallest lesions to the largest."""
        rows = self.own.finest.rows
        for part in np.array_split(np.argsort(self.lesion_areas, kind="stable"), 4):
            if len(part):
                areas = self.lesion_areas[part]
                scores = DiceSummary.of(rows[part]).scores()
                yield {"least_area": float(areas[0]), "largest_area": float(areas[-1]), **scores}

    def _by_value(self, subgroups: Subgroups) -> dict[str, Any]:
        rows = self.own.finest.rows
        values = np.array([subgroups.values.get(self.split.key(number), "") for number in rows[:, 0].tolist()])
        groups = [
            {"value": str(value), **DiceSummary.of(rows[values == value]).scores()} for value in np.unique(values)
        ]
        return {"column": subgroups.column, "groups": groups}

    def _per_image(self) -> list[dict[str, Any]]:
        columns = {
            "id": [self.split.key(number) for number in self.own.network.rows[:, 0].tolist()],
            "original_height": self.original_sizes[:, 0].tolist(),
            "original_width": self.original_sizes[:, 1].tolist(),
            "lesion_area": self.lesion_areas.tolist(),
        }
        for scored, prefix in ((self.half, ""), (self.own, "own_threshold_")):
            columns |= _columns(scored.network, prefix)
            if scored.original:
                columns |= _columns(scored.original, f"{prefix}original_")
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def show(summary: dict[str, Any], console: Console) -> None:
    """Print what `Results.summary` gave: scores with intervals, lesion areas, thresholds."""
    own = summary["own_threshold"]
    table = Table(title=f"{summary['split']}: {summary['n']} images, 95 % bootstrap interval over images")
    table.add_column("score")
    shown = [name for name in RESOLUTIONS if summary[name]]
    for name in shown:
        table.add_column(name.replace("_", " "), justify="right")
    for scored in by_threshold(summary):
        table.add_section()
        table.add_row(f"threshold {scored['threshold']:.4g}", style="bold")
        for score in NAMES:
            table.add_row(score.replace("_", " "), *(_with_interval(scored[name], score) for name in shown))
    console.print(table)

    where = f"{shown[-1].replace('_', ' ')}, threshold {own['threshold']:.4g}"
    areas = [
        (f"{part['least_area']:.1%} to {part['largest_area']:.1%}", part) for part in summary["lesion_area_quartiles"]
    ]
    console.print(_group_table("lesion area", areas, where))
    if summary["subgroups"]:
        values = [(part["value"] or "(none)", part) for part in summary["subgroups"]["groups"]]
        console.print(_group_table(summary["subgroups"]["column"], values, where))

    curve = summary["thresholds"]
    console.print(
        f"the model's own threshold is {own['threshold']:.4g}; here pooled Dice is best at "
        f"{curve['best_threshold']:.4g} ({curve['best_pooled_dice']:.4f}); average precision "
        f"{curve['average_precision']:.4f}, calibration error {curve['calibration_error']:.4f}",
        soft_wrap=True,
    )


def by_threshold(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The scores of a summary at 0.5 and at the model's own threshold; once where the two are the same."""
    own = summary["own_threshold"]
    return [summary] if own["threshold"] == summary["threshold"] else [summary, own]


def _group_table(what: str, groups: list[tuple[str, dict[str, Any]]], where: str) -> Table:
    table = Table(title=f"By {what}, {where}")
    for name in (what, "n", *NAMES):
        table.add_column(name.replace("_", "\n"), justify="right")
    for label, scores in groups:
        table.add_row(label, str(scores["n"]), *(f"{scores[name]:.4f}" for name in NAMES))
    return table


def _with_interval(scores: dict[str, Any], name: str) -> str:
    low, high = scores["interval_95"][name]
    return f"{scores[name]:.4f} ({low:.4f} to {high:.4f})"


def _columns(summary: DiceSummary, prefix: str) -> dict[str, list[Any]]:
    tp, fp, fn = summary.rows[:, 1:].T
    dice, jaccard = per_image_scores(summary.rows)
    columns = {"tp": tp, "fp": fp, "fn": fn, "dice": dice, "jaccard": jaccard}
    return {f"{prefix}{name}": values.tolist() for name, values in columns.items()}


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    write_file(path, csv_bytes(rows[0], [list(row.values()) for row in rows]))
