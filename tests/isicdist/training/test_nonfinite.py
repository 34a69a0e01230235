"""Steps that are not finite change nothing, and too many of them in a row end the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from isicdist.data.stream import StreamState
from isicdist.errors import TrainingError
from isicdist.training.nonfinite import OVERFLOWS, NonFiniteGuard

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


def test_an_overflow_of_a_scaled_gradient_is_counted_and_ends_the_run_only_when_it_stays():
    run = Run(limit=0, scaled=True)
    assert not run.take(ONE, ONE)
    assert all(run.take(ONE, INF) for _ in range(OVERFLOWS))  # while the scaler looks for its scale
    assert not run.take(ONE, ONE)
    for _ in range(OVERFLOWS + 1):
        run.take(ONE, INF)
    with pytest.raises(TrainingError, match=f"not finite in {OVERFLOWS + 1} steps in a row"):
        run.take(ONE, ONE)


def test_a_bad_loss_ends_a_scaled_run_at_the_limit():
    run = Run(limit=0, scaled=True)
    assert run.take(NAN, NAN)
    with pytest.raises(TrainingError, match="in 1 steps in a row, the last one step 1"):
        run.take(ONE, ONE)


@pytest.fixture(scope="module")
def whole_steps(python, tmp_path_factory) -> dict[str, list[dict]]:
    """Every combination of loss, gradient and scaling, by rank, as `step_worker.py` says."""
    out = tmp_path_factory.mktemp("steps")
    done = python(Path(__file__).parent / "step_worker.py", out)
    assert done.returncode == 0, done.stderr
    return {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}


def test_whatever_is_not_finite_on_one_rank_changes_no_weight_on_any(whole_steps):
    assert set(whole_steps) == {"1-0", "2-0", "2-1"}
    for rows in whole_steps.values():
        assert len(rows) == 32
        for row in rows:
            bad = (row["loss"], row["gradient"]) != ("finite", "finite")
            assert (row["first"], row["skipped"], row["again"]) == (False, bad, False), row
            assert row["same"] is bad, row
            assert row["lowered"] is (bad and row["scaled"]), row
    assert whole_steps["2-0"] == whole_steps["2-1"]


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


def test_a_bad_gradient_ends_an_unscaled_run_at_the_limit():
    """Without a scaler there is no scale to be found: it counts like a bad loss."""
    run = Run(limit=1)
    run.take(ONE, INF)
    run.take(ONE, INF)
    with pytest.raises(TrainingError, match="in 2 steps in a row"):
        run.take(ONE, ONE)
