"""Optimizer parts: parameter groups, learning-rate schedule, EMA (moving average) of the weights, early stopping."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from isicdist.config import Schedule


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Make two groups for the optimizer: weight decay (L2) for convolutions, none for biases and norms."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": weights, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def learning_rate(kind: Schedule, peak: float, step: int, total_steps: int, epoch: int) -> float:
    """Compute the learning rate of step `step` (from 0) of `total_steps`, in epoch `epoch` (from 0).

    Stateless, so that resume is exact.

    one-cycle: a cosine rise from peak / 25 to `peak` over the first quarter, then a cosine fall to peak / 10,000
    (Smith and Topin, arXiv:1708.07120). paper: peak x 0.985^epoch (arXiv:1802.10508, section 2.4).
    """
    if kind == "paper":
        return peak * 0.985**epoch
    rise = total_steps / 4
    if step < rise:
        return _cosine(peak / 25, peak, step / rise)
    return _cosine(peak, peak / 10_000, (step - rise) / max(1.0, total_steps - 1 - rise))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, share))) / 2


class Ema:
    """Exponential moving average of the weights: a second network, which is evaluated and saved as the best model.

    Its only state is its weights: the decay is a function of the step. Every rank has the same one.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Copy `model`. `decay` in [0, 1): share of the average that remains at each step; 0 follows the weights."""
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay
        # Listed once: a walk through both networks takes 0.3 ms of each step.
        self._averages: list[Tensor] = list(self.model.parameters())
        self._weights: list[Tensor] = list(model.parameters())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average in the weights of the model after `step` steps (from 1).

        The decay is at most (1 + step) / (10 + step), so that the initial weights fade and the average covers about
        the last tenth of a short run.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(self._averages, self._weights, 0)


@dataclass(kw_only=True)
class EarlyStopping:
    """Early stopping on the mean Dice of the validation split."""

    patience: int
    """Stop after this many evaluations without improvement; 0: never."""
    best: float = -1.0
    """Best mean Dice so far; -1 before the first evaluation."""
    evals_since_best: int = 0
    """Evaluations since the best one."""

    def update(self, mean_dice: float) -> bool:
        """Record one evaluation; returns True when it is the best so far."""
        if mean_dice > self.best:
            self.best, self.evals_since_best = mean_dice, 0
            return True
        self.evals_since_best += 1
        return False

    @property
    def reached(self) -> bool:
        """Patience has run out."""
        return 0 < self.patience <= self.evals_since_best
