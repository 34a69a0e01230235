"""Table of the checks: one row for what is the same on all ranks, one per state otherwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from isicdist.doctor.check import Check

_MAX_SHOWN = 4


def merge_ranks(of_ranks: Sequence[Sequence[Check]]) -> list[Check]:
    """Merge the checks of all ranks: those of one name and state become one, which lists the different findings.

    The numbers are those of the first of these ranks. A check that not all ranks have in this state names its ranks.
    """
    if len(of_ranks) == 1:
        return list(of_ranks[0])
    groups: dict[tuple[str, str], list[tuple[int, Check]]] = {}
    for name in dict.fromkeys(check.name for checks in of_ranks for check in checks):
        for rank, checks in enumerate(of_ranks):
            for check in checks:
                if check.name == name:
                    groups.setdefault((name, check.state), []).append((rank, check))
    return [_merge(group, len(of_ranks)) for group in groups.values()]


def _merge(group: list[tuple[int, Check]], world_size: int) -> Check:
    first = group[0][1]
    found: dict[str, list[int]] = {}
    for rank, check in group:
        found.setdefault(check.found, []).append(rank)
    if len(group) == world_size and len(found) == 1:
        return first
    lines = [f"{_ranks(ranks)}: {text}" for text, ranks in list(found.items())[:_MAX_SHOWN]]
    if len(found) > _MAX_SHOWN:
        lines.append(f"{len(found) - _MAX_SHOWN} other findings")
    return dataclasses.replace(first, found="; ".join(lines))


def _ranks(ranks: list[int]) -> str:
    """Write rank 3, or ranks 0-2 5 7-9."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = " ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def render(checks: Sequence[Check]) -> Table:
    """Lay out the checks, a row each."""
    table = Table("check", "")
    table.add_column("found", overflow="fold")
    table.add_column("what to do", overflow="fold")
    for check in checks:
        style = {"ok": "green", "warn": "yellow", "fail": "bold red"}[check.state]
        table.add_row(check.name, f"[{style}]{check.state}[/]", escape(check.found), escape(check.advice))
    return table
