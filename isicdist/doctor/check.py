"""Result of one check of `isicdist doctor`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

State = Literal["ok", "warn", "fail"]
GIB = 2**30
INSTALL = "pip install -c constraints.txt -e ."


@dataclass(frozen=True, kw_only=True)
class Check:
    """Result of one check."""

    name: str
    """Name of the thing checked."""
    state: State
    """ok; warn: training works, but slower or other than intended; fail: it does not work."""
    found: str
    """Version or finding, in one line."""
    advice: str = ""
    """Remedy, in one line; empty for ok."""
    numbers: Mapping[str, float] = field(default_factory=dict[str, float])
    """Measurements, by a name that ends with the unit."""
