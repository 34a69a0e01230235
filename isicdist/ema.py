"""The moving average of the weights: what is evaluated, and kept as the best model."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


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
