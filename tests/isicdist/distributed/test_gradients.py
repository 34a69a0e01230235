"""The gradient of a step in one flat tensor."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from isicdist.distributed.gradients import Gradients


def test_gradients_add_up_over_micro_batches_and_are_forgotten_after_the_step():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 1, 1))
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    images = torch.randn((4, 2, 5, 5), generator=torch.Generator().manual_seed(0))
    expected = torch.autograd.grad(model(images).sum(), list(model.parameters()))
    gradients = Gradients(model.parameters(), Accelerator(cpu=True))
    for _ in range(2):  # the second step knows nothing of the first
        for part in images.split(2):
            loss = model(part).sum()
            loss.backward()
            gradients.add_micro_batch(loss)
        torch.testing.assert_close(gradients.all_reduce(), model(images).sum().detach())
        for p, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, gradient)
        gradients.zero()
        assert all(p.grad is None for p in model.parameters())


def test_micro_batches_add_up_as_autograd_does_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.LeakyReLU(), nn.Conv2d(3, 1, 1))
    model[0].weight.requires_grad_(False)  # never has a gradient
    parts = torch.randn((6, 2, 5, 5), generator=generator).split(2)
    for part in parts:
        model(part).square().sum().backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    gradients = Gradients(model.parameters(), Accelerator(cpu=True))
    for part in parts:
        loss = model(part).square().sum()
        loss.backward()
        gradients.add_micro_batch(loss)
        assert all(p.grad is None for p in model.parameters())
    gradients.all_reduce()
    for p, gradient in zip(model.parameters(), expected, strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, torch.zeros_like(p) if gradient is None else gradient)


def test_the_loss_that_is_returned_outlives_the_step():
    model = nn.Linear(1, 1)
    gradients = Gradients(model.parameters(), Accelerator(cpu=True))
    gradients.add_micro_batch(torch.tensor(2.0))
    loss = gradients.all_reduce()
    gradients.zero()
    assert loss == 2


@pytest.mark.parametrize(("length", "max_norm", "clipped"), [(5.0, 1.0, 1.0), (0.5, 1.0, 0.5), (5.0, 0.0, 5.0)])
def test_a_long_gradient_is_clipped_and_a_short_one_is_not_changed(length, max_norm, clipped):
    weight = nn.Parameter(torch.zeros(2))
    gradients = Gradients([weight], Accelerator(cpu=True))
    weight.grad = torch.tensor([0.6, 0.8]) * length
    gradients.add_micro_batch(torch.tensor(100.0))  # which lies beside it, and is no part of it
    gradients.all_reduce()
    norm = gradients.clip(max_norm, torch.optim.SGD([weight]))
    assert norm.item() == pytest.approx(length)
    assert weight.grad is not None
    assert weight.grad.norm().item() == pytest.approx(clipped, rel=1e-5)
