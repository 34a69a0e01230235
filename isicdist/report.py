"""What a run has come to: its scores as a table, its curves as a picture."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from isicdist.errors import CheckpointError
from isicdist.metrics.bootstrap import NAMES
from isicdist.metrics.results import RESOLUTIONS, SUMMARY_NAME, THRESHOLDS_NAME, by_threshold
from isicdist.training.tracking import CONFIG_NAME, METRICS_NAME

REPORT_NAME = "report.png"


def report(run: Path, console: Console) -> None:
    """Print the run's settings and scores and write RUN/report.png. Raises CheckpointError for no run."""
    if not (run / METRICS_NAME).is_file():
        raise CheckpointError(f"{run}: not a run (no {METRICS_NAME}); give the folder that train --run wrote")
    lines = (run / METRICS_NAME).read_text().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]  # a killed run may leave half a line
    events = [_parsed(line, run / METRICS_NAME) for line in whole]
    config = _parsed((run / CONFIG_NAME).read_text(), run / CONFIG_NAME)
    train = [event for event in events if event["event"] == "train"]
    evaluations = [event for event in events if event["event"] == "evaluate"]
    if not train:
        raise CheckpointError(f"{run}: nothing is logged in it yet; wait for its first steps")

    last, precision = train[-1], config["mixed_precision"]
    console.print(
        f"step {last['step']} · epoch {last['epoch']} · {last['samples']} samples · {config['world_size']} processes · "
        f"{'float32' if precision == 'no' else precision} · global batch {config['batch']['global_size']}"
    )
    table = Table("split", "resolution", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in ("threshold", "n", *NAMES):
        table.add_column(name.replace("_", "\n"), justify="right")
    best = max(evaluations, key=lambda event: event["mean_dice"], default=None)
    if best:
        console.print(f"best model: step {best['step']}")
        table.add_row(f"{best['split']} (best)", "network", "0.5", *_cells(best))
    thresholds = {}
    for path in sorted((run / "evaluation").glob(f"*/{SUMMARY_NAME}")):
        summary = _parsed(path.read_text(), path)
        if "own_threshold" not in summary:
            raise CheckpointError(f"{path}: of an older isicdist; evaluate the split again")
        for scored in by_threshold(summary):
            for name in RESOLUTIONS:
                if scored[name]:
                    where = (summary["split"], name.removesuffix("_resolution"), f"{scored['threshold']:.4g}")
                    table.add_row(*where, *_cells(scored[name]))
        if best and summary["model_step"] != best["step"]:
            console.print(f"{summary['split']} was evaluated at step {summary['model_step']}: evaluate it again")
        with (path.parent / THRESHOLDS_NAME).open(newline="") as file:
            rows = csv.DictReader(file)
            thresholds[summary["split"]] = [{name: float(value) for name, value in row.items()} for row in rows]
    console.print(table)

    from isicdist.metrics.figures import draw_curves

    draw_curves(train, evaluations, thresholds, run / REPORT_NAME)
    console.print(f"curves: {run / REPORT_NAME}", soft_wrap=True)
    for path in sorted((run / "evaluation").glob("*/examples.png")):
        console.print(f"worst, median and best images: {path}", soft_wrap=True)


def _cells(scores: dict[str, Any]) -> list[str]:
    return [str(scores["n"]), *(f"{scores[name]:.4f}" for name in NAMES)]


def _parsed(text: str, path: Path) -> dict[str, Any]:
    try:
        return json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged, not JSON ({error})") from error
