"""Table of a run's scores for the console."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from isicdist.metrics.dice import SCORE_NAMES
from isicdist.report.collect import RunFiles


def print_run(run: RunFiles, console: Console) -> None:
    """Print the settings and scores of a run, and the evaluations that are out of date."""
    line = describe(run)
    console.print(line.replace(" ·", ",") if console.options.ascii_only else line)
    if run.best:
        console.print(f"best model: step {run.best.step}")
    for summary in run.outdated:
        console.print(f"{summary.split} was evaluated at step {summary.model_step}: evaluate it again")
    console.print(_score_table(run))
    for evaluation in run.evaluations.values():
        picture = evaluation.folder / "examples.png"
        if picture.exists():
            console.print(f"worst, median and best images: {picture}", markup=False, soft_wrap=True)


def describe(run: RunFiles) -> str:
    """Describe in one line how far a run has come and how it was started."""
    last = run.train[-1]
    return (
        f"step {last.step} · epoch {last.epoch} · {last.samples} samples · {run.config['world_size']} processes · "
        f"{run.precision} · global batch {run.config['batch']['global_size']}"
    )


def _score_table(run: RunFiles) -> Table:
    """Tabulate the scores by split, resolution and threshold: of the best model, on `val` and the evaluated splits."""
    table = Table("split", "resolution", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in ("threshold", "n", *SCORE_NAMES):
        table.add_column(name.replace("_", "\n"), justify="right")
    if run.best:
        table.add_row(f"{run.validation_split} (best)", "network", "0.5", *_cells(run.best.to_json()))
    for evaluation in run.evaluations.values():
        summary, excluded = evaluation.summary, evaluation.summary.without_excluded
        rows = [(summary.split, scored) for scored in summary.by_threshold()]
        if excluded:
            rows += [
                (f"{summary.split} without {escape(excluded.table)}", scored) for scored in excluded.by_threshold()
            ]
        for split, scored in rows:
            for resolution, scores in scored.by_resolution().items():
                table.add_row(split, resolution, f"{scored.threshold:.4g}", *_cells(dataclasses.asdict(scores)))
    return table


def _cells(scores: Mapping[str, Any]) -> list[str]:
    return [str(scores["n"]), *(f"{scores[name]:.4f}" for name in SCORE_NAMES)]
