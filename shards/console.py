"""Output of the `isic-shards` command: tables and summaries.

rich is imported late: a build whose output goes to a file saves its 60 ms.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from shards import format
from shards.build import BuildResult
from shards.format import Counts
from shards.inputs.match import EXCLUDED, REASONS, Rejected
from shards.mask_statistics import mask_warnings
from shards.planning.split import sorted_splits
from shards.reader import ShardSet

if TYPE_CHECKING:
    from rich.console import Console

MAX_LISTED = 50  # rejected inputs that are listed
LOG_WIDTH = 160  # characters in a line if the output is no terminal


def _console(*, stderr: bool = False) -> Console:
    """Make a rich console without markup and highlighting: names of files and digests are printed verbatim."""
    from rich.console import Console

    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, markup=False, highlight=False, width=None if terminal else LOG_WIDTH)


def print_rejected(rejected: list[Rejected]) -> None:
    """Print the rejected inputs as a table on stderr."""
    from rich.table import Table

    console = _console(stderr=True)
    table = Table("path", "reason", "detail", title="Inputs that cannot be used")
    for row in rejected[:MAX_LISTED]:
        table.add_row(row.path, row.reason, row.detail)
    console.print(table)
    if len(rejected) > MAX_LISTED:
        console.print(f"... and {len(rejected) - MAX_LISTED} more")
    for reason, number in Counter(row.reason for row in rejected).most_common():
        console.print(f"{number:8d}  {reason}: {REASONS[reason]}")


def print_build(result: BuildResult) -> None:
    """Print the summary of a build, and on stderr what looks wrong about its splits."""
    counts, splits = result.index.counts, result.index.splits
    parts = ", ".join(f"{name} {splits[name].samples}" for name in sorted_splits(splits))
    if result.already_complete:
        print(f"{result.location}: already complete ({parts}); nothing to do")
        return
    print(
        f"{result.location}: {parts} samples; {counts.found} files found, {counts.packed} packed, "
        f"{counts.rejected} rejected, {counts.ignored} ignored"
    )
    pairs = counts.packed // 2
    if result.grouped is not None and result.grouped < pairs:
        print(f"--groups names {result.grouped} of the {pairs} images; each of the others is a group of its own")
    if EXCLUDED in counts.reasons:
        number, known = counts.reasons[EXCLUDED] // 2, result.excluded
        lost = [f"{name} {known[name]}" for name in sorted_splits(known)]
        unknown = number - sum(known.values())
        lost += [f"{unknown} not in the --split-file"] if unknown else []
        print(f"--exclude leaves out {number} images, by the split they would be in: {', '.join(lost)}")
    if counts.rejected:
        print(f"what was left out is listed in {result.location}/{format.REJECTED_NAME}")
    for flag, number in counts.flags.items():
        print(f"{number} samples are flagged {flag}")
    if format.COPIED in counts.flags:
        print("of copied samples, only equal bytes count as duplicates, and lesion areas are not counted")
    if counts.duplicates:
        path = f"{result.location}/{format.DUPLICATES_NAME}"
        print(f"duplicates by what is the same: {_duplicates(counts)}; listed in {path}")
    for line in result.warnings:
        print(f"warning: {line}", file=sys.stderr)


def print_info(shard_set: ShardSet) -> None:
    """Print the content of a set: a table of its splits, how it was built, and its counts."""
    from rich.table import Table
    from rich.text import Text

    index, console = shard_set.index, _console()
    table = Table("split", title=shard_set.location)
    for name in ("shards", "samples", "MB", "original size", "lesion area"):
        table.add_column(name, justify="right")
    for name in sorted_splits(index.splits):
        entry = index.splits[name]
        rows = shard_set.split(name).table
        megabytes = sum(shard.bytes for shard in entry.shards) / 1e6
        table.add_row(
            name,
            str(len(entry.shards)),
            str(entry.samples),
            f"{megabytes:.1f}",
            _sizes(rows["height"], rows["width"]),
            _areas(rows, shard_set.size),
        )
    console.print(table)
    console.print("Lesion area: 10th / 50th / 90th percentile of its share of the picture.")
    counts, built = index.counts, index.built
    lines = {
        "images": f"{shard_set.size} × {shard_set.size} pixels" if shard_set.size else "at their original sizes",
        "built with": ", ".join(f"{k} {_option(v)}" for k, v in built.items() if k not in ("inputs", "size") and v),
        "files": f"{counts.found} found = {counts.packed} packed + {counts.rejected} rejected "
        f"+ {counts.ignored} ignored",
        "rejected": ", ".join(f"{number} {reason}" for reason, number in counts.reasons.items()) or "none",
        "flags": ", ".join(f"{number} {flag}" for flag, number in counts.flags.items()) or "none",
        "duplicates": _duplicates(counts) or "none",
        "digest": shard_set.digest,
    }
    for name, text in lines.items():
        console.print(Text.assemble((name, "bold"), f"  {text}"), soft_wrap=True)


def _option(option: Any) -> Any:
    """Give an option as the user gave it; of a table of groups only its column."""
    return cast("Mapping[str, Any]", option)["column"] if isinstance(option, Mapping) else option


def _duplicates(counts: Counts) -> str:
    """Format the pairs of duplicates by kind, with a warning if a given split puts some into two splits."""
    if counts.duplicates is None:
        return "unknown: an older version has built this set"
    text = ", ".join(f"{number} {kind}" for kind, number in counts.duplicates.items())
    across = counts.duplicates_across_splits
    return f"{text} (WARNING: {across} of them lie in two splits)" if across else text


def print_mask_warnings(shard_set: ShardSet) -> None:
    """Print on stderr what looks wrong about the masks of a set."""
    for name in sorted_splits(shard_set.index.splits):
        for line in mask_warnings(shard_set.split(name)):
            print(f"warning: {line}", file=sys.stderr)


def _sizes(height: np.ndarray, width: np.ndarray) -> str:
    """Format the smallest and the largest size of the originals, by area."""
    if not len(height):
        return "-"
    low, high = int(np.argmin(height * width)), int(np.argmax(height * width))
    smallest, largest = (f"{width[i]} × {height[i]}" for i in (low, high))
    return smallest if smallest == largest else f"{smallest} to {largest}"


def _areas(rows: np.ndarray, size: int | None) -> str:
    """Format the 10th, 50th and 90th percentile of the lesion's share of the image."""
    if not len(rows):
        return "-"
    rows = rows[rows["foreground"] != format.UNCOUNTED]
    if not len(rows):
        return "not counted"
    pixels = size * size if size else rows["height"].astype(np.int64) * rows["width"]
    return " / ".join(f"{share:.0%}" for share in np.quantile(rows["foreground"] / pixels, (0.1, 0.5, 0.9)))
