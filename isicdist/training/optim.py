"""Optimizer parts: parameter groups, the learning-rate schedule, EMA of the weights, early stopping."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

ScheduleKind = Literal["one-cycle", "paper"]


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


class Ema:
    """A second network beside the one that is trained, whose weights are the exponential mean of its weights.

    It has no state but its weights: how fast it follows is a function of the step. Every rank keeps the same one.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """`decay`: the share of the mean that stays at each step, in [0, 1); 0: the mean is the last weights."""
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights of `model` after `step` steps (from 1).

        The first weights are soon forgotten: the decay is at most (1 + step) / (10 + step), so that the mean
        reaches over about the last tenth of a short run.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(list(self.model.parameters()), list(model.parameters()), 0)


@dataclass(kw_only=True)
class EarlyStopping:
    """The best mean Dice of the validation split so far."""

    patience: int
    """Evaluations without a better one that end the run; 0: none do."""
    best: float = -1.0
    """Its mean Dice; -1 before the first evaluation."""
    since: int = 0
    """Evaluations after it."""

    def better(self, mean_dice: float) -> bool:
        """Take in one evaluation; returns whether it is the best so far."""
        if mean_dice > self.best:
            self.best, self.since = mean_dice, 0
            return True
        self.since += 1
        return False

    @property
    def over(self) -> bool:
        """Whether patience has run out."""
        return 0 < self.patience <= self.since


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for the optimizer: L2 holds for the weights of convolutions, not for biases and norms."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": weights, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
