"""Report of a run: scores as a table on the console, learning and threshold curves as RUN/report.png."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from isicdist.errors import CheckpointError
from isicdist.metrics.dice import SCORE_NAMES
from isicdist.metrics.results import THRESHOLDS_NAME
from isicdist.metrics.summary import SUMMARY_NAME, EvaluationSummary
from isicdist.training.tracking import CONFIG_NAME, METRICS_NAME, EvaluationMetrics, TrainMetrics, read_metrics

REPORT_NAME = "report.png"


def report(run: Path, console: Console) -> None:
    """Print the settings and scores of a run and write RUN/report.png.

    Raises CheckpointError for a folder that is not a run, has no training step yet, or holds a damaged file.
    """
    if not (run / METRICS_NAME).is_file():
        raise CheckpointError(f"{run}: not a run (no {METRICS_NAME}); give the folder that train --run wrote")
    train, evaluations = read_metrics(run / METRICS_NAME)
    config = _read_json(run / CONFIG_NAME)
    if not train:
        raise CheckpointError(f"{run}: nothing is logged in it yet; wait for its first steps")
    best = max(evaluations, key=lambda scores: scores.mean_dice, default=None)
    folders = [path.parent for path in sorted((run / "evaluation").glob(f"*/{SUMMARY_NAME}"))]
    summaries = {folder: _read_summary(folder / SUMMARY_NAME) for folder in folders}

    console.print(_describe(config, train[-1]))
    if best:
        console.print(f"best model: step {best.step}")
        for summary in summaries.values():
            if summary.model_step != best.step:
                console.print(f"{summary.split} was evaluated at step {summary.model_step}: evaluate it again")
    console.print(_score_table(best, summaries.values()))

    from isicdist.metrics.figures import draw_curves

    thresholds = {summary.split: _read_thresholds(folder / THRESHOLDS_NAME) for folder, summary in summaries.items()}
    curves, scores = ([event.to_json() for event in events] for events in (train, evaluations))
    draw_curves(curves, scores, thresholds, run / REPORT_NAME)
    console.print(f"curves: {run / REPORT_NAME}", soft_wrap=True)
    for path in sorted((run / "evaluation").glob("*/examples.png")):
        console.print(f"worst, median and best images: {path}", soft_wrap=True)


def _describe(config: Mapping[str, Any], last: TrainMetrics) -> str:
    precision = config["mixed_precision"]
    return (
        f"step {last.step} · epoch {last.epoch} · {last.samples} samples · {config['world_size']} processes · "
        f"{'float32' if precision == 'no' else precision} · global batch {config['batch']['global_size']}"
    )


def _score_table(best: EvaluationMetrics | None, summaries: Iterable[EvaluationSummary]) -> Table:
    """Tabulate the scores by split, resolution and threshold: of the best model, on `val` and the evaluated splits."""
    table = Table("split", "resolution", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in ("threshold", "n", *SCORE_NAMES):
        table.add_column(name.replace("_", "\n"), justify="right")
    if best:
        table.add_row(f"{best.split} (best)", "network", "0.5", *_cells(best.to_json()))
    for summary in summaries:
        for scored in summary.by_threshold():
            for resolution, scores in scored.by_resolution().items():
                cells = _cells(dataclasses.asdict(scores))
                table.add_row(summary.split, resolution, f"{scored.threshold:.4g}", *cells)
    return table


def _cells(scores: Mapping[str, Any]) -> list[str]:
    return [str(scores["n"]), *(f"{scores[name]:.4f}" for name in SCORE_NAMES)]


def _read_summary(path: Path) -> EvaluationSummary:
    try:
        return EvaluationSummary.from_json(_read_json(path))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: of an older isicdist; evaluate the split again") from error


def _read_thresholds(path: Path) -> list[dict[str, float]]:
    """Read thresholds.csv: scores and calibration bins at each threshold."""
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged, not JSON ({error})") from error
