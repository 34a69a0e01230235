"""Steps that are not finite change nothing, and too many of them in a row end the run."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from isicdist.data.stream import StreamState
from isicdist.errors import TrainingError
from isicdist.training.nonfinite import NonFiniteGuard

ONE, NAN, INF = torch.tensor(1.0), torch.tensor(float("nan")), torch.tensor(float("inf"))


def at(epoch: int) -> StreamState:
    return {"digest": "", "seed": 0, "window": None, "epoch": epoch, "consumed": 0}


class Run:
    """One weight, its optimizer and its guard."""

    def __init__(self, *, limit: int = 10, scaled: bool = False, keys: int = 2) -> None:
        self.weight = nn.Parameter(torch.ones(3))
        self.adam = torch.optim.Adam([self.weight], lr=0.1, weight_decay=0.1, fused=True)
        names = [f"ISIC_{number}" for number in range(keys)]
        self.guard = NonFiniteGuard(
            self.adam,
            limit=limit,
            scaled=scaled,
            sample_names=lambda position: [f"{position['epoch']}/{n}" for n in names],
        )
        self.step = 0

    def take(self, loss: Tensor, norm: Tensor) -> bool:
        self.step += 1
        self.weight.grad = torch.full((3,), float(norm))
        bad = self.guard.check(self.step, at(self.step), loss, norm)
        self.adam.step()
        return bool(bad)

    def state(self) -> list[Tensor]:
        return [self.weight.detach().clone(), *(value.clone() for value in self.adam.state[self.weight].values())]


@pytest.mark.parametrize(("loss", "norm"), [(NAN, NAN), (INF, ONE), (ONE, INF), (ONE, NAN)])
def test_a_bad_step_changes_neither_weights_nor_moments(loss, norm):
    run = Run()
    assert not run.take(ONE, ONE)
    before = run.state()
    assert run.take(loss, norm)
    assert all(torch.equal(one, other) for one, other in zip(before, run.state(), strict=True))
    assert not run.take(ONE, ONE)
    assert not torch.equal(before[0], run.weight)


def test_an_overflow_of_a_scaled_gradient_is_no_failure():
    run = Run(limit=0, scaled=True)
    assert not run.take(ONE, INF)
    assert run.take(NAN, NAN)


def test_the_guard_and_the_gradient_scaler_agree_on_a_step():
    """fp16 as on a GPU, through accelerate's optimizer: an overflow is skipped by the scaler, and halves its scale."""
    Accelerator(cpu=True)  # its state is what the optimizer asks
    run = Run(limit=0, scaled=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=1000)
    optimizer = AcceleratedOptimizer(run.adam, scaler=scaler)

    def take(loss: Tensor) -> bool:
        run.step += 1
        run.weight.grad = None
        scaler.scale(loss * run.weight.sum()).backward()
        scaler.unscale_(run.adam)
        assert run.weight.grad is not None
        norm = run.weight.grad.norm()
        bad = run.guard.check(run.step, at(0), loss, norm)
        optimizer.step()
        return bool(bad)

    assert not take(ONE)
    before = run.state()
    assert not take(torch.tensor(1e38))  # finite, but not 65,536 times it
    assert scaler.get_scale() == 2.0**15
    assert all(torch.equal(one, other) for one, other in zip(before, run.state(), strict=True))
    assert not take(ONE)
    assert not torch.equal(before[0], run.weight)
    assert take(NAN)
    with pytest.raises(TrainingError, match="in 1 steps in a row, the last one step 4"):
        take(ONE)


def test_more_in_a_row_than_the_limit_name_the_last_step_and_its_samples():
    run = Run(limit=2, keys=12)
    for loss in (NAN, NAN, ONE, NAN, NAN, NAN):
        run.take(loss, loss)
    with pytest.raises(
        TrainingError, match=r"in 3 steps in a row, the last one step 6 with samples 6/ISIC_0, "
    ) as caught:
        run.take(ONE, ONE)
    assert "6/ISIC_7 and 4 more" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_as_many_as_the_limit_are_borne():
    run = Run(limit=2)
    for loss in (NAN, NAN, ONE, NAN, NAN, ONE):
        run.take(loss, loss)
