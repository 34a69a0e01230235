"""What the `isic-shards` command shows: progress, tables and closing lines.

rich is imported where something is drawn: a build whose output goes to a file does without its 60 ms.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from shards import format
from shards.build import BuildResult
from shards.inputs.match import REASONS, Rejected
from shards.planning.split import in_order
from shards.reader import ShardSet

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_SECONDS = 10  # between two lines of progress where stderr is no terminal
LISTED = 50  # rejected inputs that are shown
LOG_WIDTH = 160  # characters in a line where the output is no terminal


class _Rate:
    """Items per second since the present task began."""

    def __init__(self) -> None:
        self._title, self._start, self._first = "", 0.0, 0

    def of(self, done: int, title: str) -> float:
        if title != self._title:
            self._title, self._start, self._first = title, time.monotonic(), done
        return (done - self._first) / max(time.monotonic() - self._start, 1e-9)


@contextmanager
def progress(title: str, unit: str) -> Iterator[Callable[..., None]]:
    """A function to call with (done, total) and, where there are several tasks, the title of the present one.

    It shows a bar with rate and time left, or in a log file now and then a plain line.
    """
    rate = _Rate()
    if not sys.stderr.isatty():
        said = time.monotonic()

        def plain(done: int, total: int, title: str = title) -> None:
            nonlocal said
            speed = rate.of(done, title)
            if time.monotonic() - said >= PLAIN_SECONDS:
                said = time.monotonic()
                print(f"{title}: {done} of {total} {unit}, {speed:.1f}/s", file=sys.stderr, flush=True)

        yield plain
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, rate="")

        def shown(done: int, total: int, title: str = title) -> None:
            speed = f"{rate.of(done, title):.1f} {unit}/s"
            bar.update(task, completed=done, total=total, description=title, rate=speed)

        yield shown


def _console(*, stderr: bool = False) -> Console:
    """Names of files and digests are shown as they are: no markup, no colouring."""
    from rich.console import Console

    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, markup=False, highlight=False, width=None if terminal else LOG_WIDTH)


def print_rejected(rejected: list[Rejected]) -> None:
    """The bad inputs as a table on stderr."""
    from rich.table import Table

    console = _console(stderr=True)
    table = Table("path", "reason", "detail", title="Inputs that cannot be used")
    for row in rejected[:LISTED]:
        table.add_row(row.path, row.reason, row.detail)
    console.print(table)
    if len(rejected) > LISTED:
        console.print(f"... and {len(rejected) - LISTED} more")
    for reason, number in Counter(row.reason for row in rejected).most_common():
        console.print(f"{number:8d}  {reason}: {REASONS[reason]}")


def print_build(result: BuildResult) -> None:
    """The closing lines of a build."""
    counts, splits = result.index["counts"], result.index["splits"]
    parts = ", ".join(f"{name} {splits[name]['samples']}" for name in in_order(splits))
    if result.already:
        print(f"{result.location}: already complete ({parts}); nothing to do")
        return
    print(
        f"{result.location}: {parts} samples; {counts['found']} files found, {counts['packed']} packed, "
        f"{counts['rejected']} rejected, {counts['ignored']} ignored"
    )
    if counts["rejected"]:
        print(f"what was left out is listed in {result.location}/{format.REJECTED_NAME}")
    for flag, number in counts["flags"].items():
        print(f"{number} samples are flagged {flag}")
    if format.COPIED in counts["flags"]:
        print(
            "nothing copied was decoded: only equal bytes count as duplicates, and odd masks were not looked for; "
            f"isic-shards verify --deep {result.location} decodes every pair"
        )
    if counts["duplicates"]:
        what = _duplicates(counts)
        print(f"duplicates by what is the same: {what}; listed in {result.location}/{format.DUPLICATES_NAME}")


def print_info(shard_set: ShardSet) -> None:
    """What is in a set, as a table."""
    from rich.table import Table
    from rich.text import Text

    index, console = shard_set.index, _console()
    table = Table("split", title=shard_set.location)
    for name in ("shards", "samples", "MB", "original size", "lesion area"):
        table.add_column(name, justify="right")
    for name in in_order(index["splits"]):
        entry = index["splits"][name]
        rows = shard_set.split(name).table
        megabytes = sum(shard["bytes"] for shard in entry["shards"]) / 1e6
        table.add_row(
            name,
            str(len(entry["shards"])),
            str(entry["samples"]),
            f"{megabytes:.1f}",
            _sizes(rows["height"], rows["width"]),
            _areas(rows, shard_set.size),
        )
    console.print(table)
    console.print("Lesion area: 10th / 50th / 90th percentile of its share of the picture.")
    counts, built = index["counts"], index.get("built", {})
    lines = {
        "images": f"{shard_set.size} × {shard_set.size} pixels" if shard_set.size else "at their original sizes",
        "built with": ", ".join(f"{k} {_told(v)}" for k, v in built.items() if k not in ("inputs", "size") and v),
        "files": f"{counts['found']} found = {counts['packed']} packed + {counts['rejected']} rejected "
        f"+ {counts['ignored']} ignored",
        "rejected": ", ".join(f"{number} {reason}" for reason, number in counts.get("reasons", {}).items()) or "none",
        "flags": ", ".join(f"{number} {flag}" for flag, number in counts.get("flags", {}).items()) or "none",
        "duplicates": _duplicates(counts) or "none",
        "digest": shard_set.digest,
    }
    for name, text in lines.items():
        console.print(Text.assemble((name, "bold"), f"  {text}"), soft_wrap=True)


def _told(option: Any) -> Any:
    """An option as it was given; of a table of groups its column."""
    return option["column"] if isinstance(option, dict) else option


def _duplicates(counts: dict[str, Any]) -> str:
    """The pairs of duplicates by what is the same; and a warning where a given split has torn some apart."""
    if "duplicates" not in counts:
        return "unknown: an older version has built this set"
    text = ", ".join(f"{number} {name}" for name, number in counts["duplicates"].items())
    torn = counts["duplicates_across_splits"]
    return f"{text} (WARNING: {torn} of them lie in two splits)" if torn else text


def _sizes(height: np.ndarray, width: np.ndarray) -> str:
    if not len(height):
        return "-"
    low, high = int(np.argmin(height * width)), int(np.argmax(height * width))
    least, most = (f"{width[i]} × {height[i]}" for i in (low, high))
    return least if least == most else f"{least} to {most}"


def _areas(rows: np.ndarray, size: int | None) -> str:
    if not len(rows):
        return "-"
    rows = rows[rows["foreground"] != format.UNCOUNTED]
    if not len(rows):
        return "not counted"
    pixels = size * size if size else rows["height"].astype(np.int64) * rows["width"]
    return " / ".join(f"{share:.0%}" for share in np.quantile(rows["foreground"] / pixels, (0.1, 0.5, 0.9)))
