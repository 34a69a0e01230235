"""The learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Literal, get_args

ScheduleKind = Literal["one-cycle", "paper"]
SCHEDULE_KINDS: tuple[str, ...] = get_args(ScheduleKind)


def learning_rate(kind: ScheduleKind, peak: float, step: int, total_steps: int, steps_per_epoch: int) -> float:
    """The rate of step `step` (from 0) of `total_steps`.

    one-cycle: a cosine rise from peak / 25 to `peak` over the first quarter, then a cosine fall to peak / 10,000
    (Smith and Topin, arXiv:1708.07120). paper: peak x 0.985^epoch (arXiv:1802.10508, section 2.4).
    """
    if kind == "paper":
        return peak * 0.985 ** (step // steps_per_epoch)
    rise = total_steps / 4
    if step < rise:
        return _cosine(peak / 25, peak, step / rise)
    return _cosine(peak, peak / 10_000, (step - rise) / max(1.0, total_steps - 1 - rise))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, share))) / 2
