"""Compare ranks at the start of a run: data, settings and versions must be the same on all of them.

On several machines the command is typed, the environment installed and the data copied once for each. Where one of
them differs, the ranks would wait for each other until a timeout, or train on a mixture without a word.
"""

from __future__ import annotations

import contextlib
import platform
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object

from isicdist.errors import TrainingError
from shards.errors import ToolkitError, UsageError

if TYPE_CHECKING:
    from accelerate import Accelerator

MAX_NAMED = 4
"""Ranks, and differences, that a message names; the others are counted."""


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What one rank sends to the others."""

    host: str
    facts: Mapping[str, Any]
    """Values to compare, by name."""
    error: str | None = None
    """Message of the error that has kept the rank from starting."""


@contextlib.contextmanager
def compare_ranks(accelerator: Accelerator) -> Generator[dict[str, Any]]:
    """Give a dictionary to fill with what must be the same on every rank; one all-gather compares it on exit.

    Every rank enters the block. Raises, on every rank, UsageError that names the rank that differs; where the block
    has failed on some ranks, TrainingError that names those; where it has failed on all, the error of the block.
    """
    facts: dict[str, Any] = {}
    error: ToolkitError | OSError | None = None
    try:
        yield facts
    except (ToolkitError, OSError) as raised:
        if accelerator.num_processes == 1:
            raise
        error = raised
    message = None if error is None else str(error)
    reports: list[RankReport] = gather_object([RankReport(host=platform.node(), facts=facts, error=message)])
    failed = [rank for rank, report in enumerate(reports) if report.error]
    if error and len(failed) == len(reports):
        raise error
    if failed:
        raise TrainingError(f"{_named(failed, reports)}: {reports[failed[0]].error}") from error
    message = difference(reports)
    if message:
        raise UsageError(message)


def difference(reports: Sequence[RankReport]) -> str | None:
    """Describe in one line what differs between ranks; None where all agree. With a tie, rank 0 counts as right."""
    lines: list[str] = []
    for name in dict.fromkeys(name for report in reports for name in report.facts):
        values = [str(report.facts.get(name, "not set")) for report in reports]
        common = Counter(values).most_common(1)[0][0]  # of equally common values the first
        for value in dict.fromkeys(values):
            ranks = [rank for rank, each in enumerate(values) if each == value]
            if value != common:
                lines.append(f"{name} is {value} on {_named(ranks, reports)}, {common} on the others")
    if not lines:
        return None
    more = [f"and {len(lines) - MAX_NAMED} more"] if len(lines) > MAX_NAMED else []
    return f"ranks differ: {'; '.join(lines[:MAX_NAMED] + more)}; give all machines the same command, data and versions"


def _named(ranks: Sequence[int], reports: Sequence[RankReport]) -> str:
    """Name ranks and their hosts: rank 3 (node-b)."""
    names = [f"rank {rank} ({reports[rank].host})" for rank in ranks[:MAX_NAMED]]
    return ", ".join(names) + (f" and {len(ranks) - MAX_NAMED} more" if len(ranks) > MAX_NAMED else "")
