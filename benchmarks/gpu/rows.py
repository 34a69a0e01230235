"""Rows of the kit's table: one check or measurement each, written to disk as soon as it is there."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import torch

from shards.files import write_file

Result = Literal["passed", "failed", "measured", "not run", "needs a GPU", "needs a compiler"]
SHOWN_KERNELS = 10
"""Kernels of a profile that the table shows; gpu.json has more."""
SHOWN_LETTERS = 100
"""Letters of a kernel's name that the table shows."""
DEVICE_LOST = 3
"""Exit code of a process whose GPU answers no more: its last row has failed, and the others need a new process."""
_MARK = '{"row": '
"""Beginning of the lines by which a child process hands a row to the kit."""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel of the device in a profile, or one operator on a CPU."""

    name: str
    calls: float
    """Calls in a step."""
    ms: float
    """Milliseconds of a step."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of a row that did not raise."""

    detail: str = ""
    values: Mapping[str, float] = field(default_factory=dict)
    """Numbers for the JSON file and for the targets, by name and unit: images_per_s, step_ms, ..."""
    result: Result = "passed"
    kernels: Sequence[Kernel] = ()
    """Those that take the most time, the longest first."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    name: str
    result: Result
    detail: str = ""
    seconds: float = 0.0
    values: Mapping[str, float] = field(default_factory=dict)
    kernels: Sequence[Kernel] = ()

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read what `to_json` gave."""
        kernels = [Kernel(**each) for each in value["kernels"]]
        return dataclasses.replace(cls(**value), kernels=kernels)

    def to_json(self) -> dict[str, Any]:
        """Give plain values."""
        return dataclasses.asdict(self)


def run_row(name: str, function: Callable[[], Outcome]) -> Row:
    """Run a check; whatever it raises becomes a row that failed."""
    start = time.perf_counter()
    try:
        outcome = function()
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        outcome = Outcome(result="failed", detail=f"{type(error).__name__} at {where}: {error}")
    found = {each.name: getattr(outcome, each.name) for each in dataclasses.fields(outcome)}
    return Row(name=name, seconds=time.perf_counter() - start, **found)


def emit_rows(rows: Mapping[str, Callable[[], Outcome]]) -> None:
    """Run checks, by the names of their rows, and print each row for the process that started this one.

    Some errors of CUDA are sticky: every later call fails, too. After one the process ends with DEVICE_LOST.
    """
    for name, function in rows.items():
        row = run_row(name, function)
        print(json.dumps({"row": row.to_json()}), flush=True)
        if row.result == "failed" and not device_answers():
            os._exit(DEVICE_LOST)  # without destructors, which would call CUDA


def device_answers() -> bool:
    """Tell whether the GPU still does what this process asks; True where none has been used."""
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def parse(line: str) -> Row | None:
    """Read a row that a child process has printed; None for any other line."""
    return Row.from_json(json.loads(line)["row"]) if line.startswith(_MARK) else None


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
            rows = [each.to_json() for each in self.rows]
            write_file(self.folder / "gpu.json", json.dumps({**self.header, "rows": rows}, indent=1).encode())
            write_file(self.folder / "gpu.md", self.markdown().encode())

    def value(self, name: str, key: str) -> float | None:
        """Look up a number of a row; None where the row did not get that far."""
        return next((row.values[key] for row in self.rows if row.name == name and key in row.values), None)

    def markdown(self) -> str:
        """Format the table, with the counts of the results above it and the longest kernels of each profile below."""
        counts = {result: sum(row.result == result for row in self.rows) for result in Result.__args__}
        lines = [", ".join(f"{key} {value}" for key, value in self.header.items()), ""]
        lines += [", ".join(f"{count} {result}" for result, count in counts.items() if count), ""]
        lines += ["| row | result | detail | s |", "|---|---|---|---|"]
        for row in self.rows:
            lines.append(f"| {row.name} | {row.result} | {_cell(row.detail)} | {row.seconds:.1f} |")
        for row in filter(lambda each: each.kernels, self.rows):
            lines += ["", f"| {row.name} | calls | ms |", "|---|---|---|"]
            for kernel in row.kernels[:SHOWN_KERNELS]:
                lines.append(f"| {_cell(kernel.name[:SHOWN_LETTERS])} | {kernel.calls:.0f} | {kernel.ms:.2f} |")
        return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Put a text into one line of a table."""
    return " ".join(text.split()).replace("|", "\\|")
