"""Report of runs: scores as tables on the console, and one self-contained HTML page with curves and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from isicdist.metrics.pooled import POOLED_NAME
from isicdist.metrics.tables import show_evaluation, show_pooled
from isicdist.report.collect import CrossValidation, RunFiles
from isicdist.report.terminal import print_run
from shards.errors import UsageError
from shards.files import write_file


def report(folders: Sequence[Path], console: Console, out: Path | None = None) -> None:
    """Print the settings and scores of each run; write the page `out` about all of them, if given.

    The page is made from the files of the runs alone: the same files give the same bytes. With several runs it compares
    them with the first. The folder of a cross-validation, given alone, stands for the runs of its folds, with the
    scores of all held-out images and those of the ensemble. Raises UsageError for no run, one that is named twice and
    a cross-validation beside others; CheckpointError for a folder that is not a run, has no training step yet, or holds
    a damaged file.
    """
    if not folders:
        raise UsageError("report: name at least one run, as isicdist report RUN")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UsageError("report: a run is named twice; name each once")
    crossvals = [folder for folder in folders if (folder / POOLED_NAME).is_file()]
    if crossvals and len(folders) > 1:
        raise UsageError(f"report: {crossvals[0]} is a cross-validation; report it alone")
    crossval = CrossValidation.read(crossvals[0]) if crossvals else None
    runs = crossval.folds if crossval else RunFiles.read_all(folders)
    if crossval:
        show_pooled(crossval.scores, console)
        for evaluation in crossval.ensemble.values():
            show_evaluation(evaluation.summary, console)
    for run in runs:
        if len(runs) > 1:
            console.rule(Text(run.name))
        print_run(run, console)
    if out is None:
        return
    from isicdist.report.page import render_page  # matplotlib, which the tables do not need

    page = render_page(runs, crossval).encode()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, page)
    console.print(f"report: {out} ({len(page) / 1e6:.1f} MB)", markup=False, soft_wrap=True)
