"""Rows of the kit's table: one check or measurement each, written to disk as soon as it is there."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from shards.files import write_file

Result = Literal["passed", "failed", "measured", "not run", "needs a GPU"]
_MARK = '{"row": '
"""Beginning of the lines by which a child process hands a row to the kit."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of a row that did not raise."""

    detail: str = ""
    values: Mapping[str, float] = field(default_factory=dict)
    """Numbers for the JSON file and for the targets, by name and unit: images_per_s, step_ms, ..."""
    result: Result = "passed"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    name: str
    result: Result
    detail: str = ""
    seconds: float = 0.0
    values: Mapping[str, float] = field(default_factory=dict)


def run_row(name: str, function: Callable[[], Outcome]) -> Row:
    """Run a check; whatever it raises becomes a row that failed."""
    start = time.perf_counter()
    try:
        outcome = function()
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        outcome = Outcome(result="failed", detail=f"{type(error).__name__} at {where}: {error}")
    return Row(name=name, seconds=time.perf_counter() - start, **dataclasses.asdict(outcome))


def emit(row: Row) -> None:
    """Print a row for the process that started this one."""
    print(json.dumps({"row": dataclasses.asdict(row)}), flush=True)


def parse(line: str) -> Row | None:
    """Read a row that a child process has printed; None for any other line."""
    return Row(**json.loads(line)["row"]) if line.startswith(_MARK) else None


class Report:
    """FOLDER/gpu.md and FOLDER/gpu.json, rewritten after each row: a kit that is cut off leaves what was done."""

    def __init__(self, folder: Path, header: Mapping[str, Any]) -> None:
        """Start with no row. `header`: date, device and versions."""
        self.folder, self.header = folder, header
        self.rows: list[Row] = []
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, row: Row) -> None:
        """Append a row, print it and write both files. Rows may come from several threads."""
        with self._lock:
            self.rows.append(row)
            print(f"{row.result:>11}  {row.name} ({row.seconds:.1f} s) {row.detail}", flush=True)
            rows = [dataclasses.asdict(each) for each in self.rows]
            write_file(self.folder / "gpu.json", json.dumps({**self.header, "rows": rows}, indent=1).encode())
            write_file(self.folder / "gpu.md", self.markdown().encode())

    def value(self, name: str, key: str) -> float | None:
        """Look up a number of a row; None where the row did not get that far."""
        return next((row.values[key] for row in self.rows if row.name == name and key in row.values), None)

    def markdown(self) -> str:
        """Format the table, with the counts of the results above it."""
        counts = {result: sum(row.result == result for row in self.rows) for result in Result.__args__}
        lines = [", ".join(f"{key} {value}" for key, value in self.header.items()), ""]
        lines += [", ".join(f"{count} {result}" for result, count in counts.items() if count), ""]
        lines += ["| row | result | detail | s |", "|---|---|---|---|"]
        for row in self.rows:
            detail = " ".join(row.detail.split()).replace("|", "\\|")
            lines.append(f"| {row.name} | {row.result} | {detail} | {row.seconds:.1f} |")
        return "\n".join(lines) + "\n"
