"""What a run has come to: its scores as a table, its curves as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from isicdist.tracking import CONFIG_NAME, METRICS_NAME
from shards.errors import CheckpointError

SCORES = ("mean_dice", "pooled_dice", "mean_jaccard", "thresholded_jaccard")
REPORT_NAME = "report.png"


def report(run: Path, console: Console) -> None:
    """Print the run's settings and scores and write RUN/report.png. Raises CheckpointError for no run."""
    if not (run / METRICS_NAME).is_file():
        raise CheckpointError(f"{run}: not a run (no {METRICS_NAME}); give the folder that train --run wrote")
    lines = (run / METRICS_NAME).read_text().splitlines(keepends=True)
    events = [json.loads(line) for line in lines if line.endswith("\n")]  # a killed run may leave half a line
    config = json.loads((run / CONFIG_NAME).read_text())
    train = [event for event in events if event["event"] == "train"]
    evaluations = [event for event in events if event["event"] == "evaluate"]
    if not train:
        raise CheckpointError(f"{run}: nothing is logged in it yet; wait for its first steps")

    last = train[-1]
    console.print(
        f"step {last['step']} · epoch {last['epoch']} · {last['samples']} samples · {config['world_size']} processes · "
        f"{config['mixed_precision']} · global batch {config['batch']['global_size']}"
    )
    table = Table(title=f"Scores of {run}")
    table.add_column("split")
    for name in ("step", "n", *SCORES):
        table.add_column(name.replace("_", "\n"), justify="right")
    if evaluations:
        best = max(evaluations, key=lambda event: event["mean_dice"])
        table.add_row(f"{best['split']} (best)", str(best["step"]), *_cells(best))
    for path in sorted((run / "evaluation").glob("*/summary.json")):
        summary = json.loads(path.read_text())
        table.add_row(summary["split"], str(summary["model_step"]), *_cells(summary))
    console.print(table)

    from isicdist.pictures import draw_curves  # late: matplotlib and torch

    draw_curves(train, evaluations, run / REPORT_NAME)
    console.print(f"curves: {run / REPORT_NAME}", soft_wrap=True)
    for path in sorted((run / "evaluation").glob("*/examples.png")):
        console.print(f"image | ground truth | prediction: {path}", soft_wrap=True)


def _cells(scores: dict[str, Any]) -> list[str]:
    return [str(scores["n"]), *(f"{scores[name]:.4f}" for name in SCORES)]
