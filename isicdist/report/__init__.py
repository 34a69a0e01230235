"""Report of runs: scores as tables on the console, and one self-contained HTML page with curves and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from isicdist.report.collect import RunFiles
from isicdist.report.terminal import print_run
from shards.errors import UsageError
from shards.files import write_file


def report(folders: Sequence[Path], console: Console, out: Path | None = None) -> None:
    """Print the settings and scores of each run; write the page `out` about all of them, if given.

    The page is made from the files of the runs alone: the same files give the same bytes. With several runs it compares
    them with the first. Raises UsageError for no run or one that is named twice, CheckpointError for a folder that is
    not a run, has no training step yet, or holds a damaged file.
    """
    if not folders:
        raise UsageError("report: name at least one run, as isicdist report RUN")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UsageError("report: a run is named twice; name each once")
    runs = RunFiles.read_all(folders)
    for run in runs:
        if len(runs) > 1:
            console.rule(run.name)
        print_run(run, console)
    if out is None:
        return
    from isicdist.report.page import render_page  # matplotlib, which the tables do not need

    page = render_page(runs).encode()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, page)
    console.print(f"report: {out} ({len(page) / 1e6:.1f} MB)", soft_wrap=True)
