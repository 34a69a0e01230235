"""Learning rates by step, the moving average of the weights, and early stopping."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from isicdist.network.unet import ImprovedUNet
from isicdist.training.optim import EarlyStopping, Ema, learning_rate, parameter_groups


def test_the_paper_multiplies_by_0_985_each_epoch():
    rates = [learning_rate("paper", 5e-4, step, 300, step // 10) for step in range(300)]
    assert rates[:10] == [5e-4] * 10
    assert rates[10] == pytest.approx(5e-4 * 0.985)
    assert rates[299] == pytest.approx(5e-4 * 0.985**29)
    assert len(set(rates)) == 30


@pytest.mark.parametrize("total", [4, 10, 100, 163])
def test_one_cycle_rises_and_falls_and_never_exceeds_its_peak(total):
    rates = [learning_rate("one-cycle", 2e-3, step, total, 0) for step in range(total)]
    top = rates.index(max(rates))
    assert top in (total // 4, total // 4 + 1)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[0] == pytest.approx(2e-3 / 25)
    assert rates[-1] == pytest.approx(2e-3 / 10_000)
    assert 0.97 * 2e-3 < max(rates) <= 2e-3
    if total % 4 == 0:
        assert max(rates) == 2e-3


@pytest.mark.parametrize("total", [1, 2, 3])
def test_a_run_of_a_few_steps_has_rates_too(total):
    assert all(0 < learning_rate("one-cycle", 1.0, step, total, 0) <= 1 for step in range(total))


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
    ema.update(1)
    assert weight(ema).item() == pytest.approx(1 - 2 / 11)
    for step in (1000, 1001):
        ema.update(step)
    assert weight(ema).item() == pytest.approx(1 - 2 / 11 * 0.9**2)
    assert model.weight.item() == 1.0


def test_without_a_decay_the_mean_is_the_weights_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    model = with_weight(0.0)
    ema = Ema(model, 0.0)
    for step in range(1, 100):
        model.weight.data.copy_(torch.randn((1, 1), generator=generator))
        ema.update(step)
        assert torch.equal(weight(ema), model.weight)


def test_the_mean_is_not_trained():
    model = with_weight(1.0)
    ema = Ema(model, 0.9)
    assert not any(p.requires_grad for p in ema.model.parameters())
    assert model.weight.requires_grad
    assert not ema.model.training


def test_only_a_better_one_counts_and_patience_begins_anew():
    selection = EarlyStopping(patience=2)
    judged = [selection.update(dice) for dice in (0.0, 0.5, 0.5, 0.6, 0.1)]
    assert judged == [True, True, False, True, False]
    assert (selection.best, selection.evals_since_best, selection.reached) == (0.6, 1, False)
    selection.update(0.6)
    assert selection.reached


def test_without_patience_nothing_ends():
    selection = EarlyStopping(patience=0, best=0.9, evals_since_best=100)
    assert not selection.reached


def test_only_the_convolutions_have_weight_decay():
    network = ImprovedUNet(base_channels=1)
    decayed, others = parameter_groups(network, 0.25)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.25, 0.0)
    convolutions = {id(m.weight) for m in network.modules() if isinstance(m, nn.Conv2d)}
    assert {id(p) for p in decayed["params"]} == convolutions
    assert {id(p) for p in others["params"]} == {id(p) for p in network.parameters()} - convolutions
