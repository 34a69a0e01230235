"""The moving average of the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from isicdist.training.optim import Ema


def with_weight(value: float) -> nn.Linear:
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(value)
    return model


def weight(ema: Ema) -> torch.Tensor:
    return next(ema.model.parameters())


def test_the_mean_follows_by_the_decay_and_faster_at_the_start():
    model = with_weight(0.0)
    ema = Ema(model, 0.9)
    model.weight.data.fill_(1.0)
    ema.update(model, 1)
    assert weight(ema).item() == pytest.approx(1 - 2 / 11)
    for step in (1000, 1001):
        ema.update(model, step)
    assert weight(ema).item() == pytest.approx(1 - 2 / 11 * 0.9**2)
    assert model.weight.item() == 1.0


def test_without_a_decay_the_mean_is_the_weights_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    model = with_weight(0.0)
    ema = Ema(model, 0.0)
    for step in range(1, 100):
        model.weight.data.copy_(torch.randn((1, 1), generator=generator))
        ema.update(model, step)
        assert torch.equal(weight(ema), model.weight)


def test_the_mean_is_not_trained():
    model = with_weight(1.0)
    ema = Ema(model, 0.9)
    assert not any(p.requires_grad for p in ema.model.parameters())
    assert model.weight.requires_grad
    assert not ema.model.training
