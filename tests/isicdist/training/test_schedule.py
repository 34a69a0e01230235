"""The learning rate as a function of the step."""

from __future__ import annotations

import pytest

from isicdist.training.optim import learning_rate


def test_the_paper_multiplies_by_0_985_each_epoch():
    rates = [learning_rate("paper", 5e-4, step, 300, 10) for step in range(300)]
    assert rates[:10] == [5e-4] * 10
    assert rates[10] == pytest.approx(5e-4 * 0.985)
    assert rates[299] == pytest.approx(5e-4 * 0.985**29)
    assert len(set(rates)) == 30


@pytest.mark.parametrize("total", [4, 10, 100, 163])
def test_one_cycle_rises_and_falls_and_never_exceeds_its_peak(total):
    rates = [learning_rate("one-cycle", 2e-3, step, total, 7) for step in range(total)]
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
    assert all(0 < learning_rate("one-cycle", 1.0, step, total, 1) <= 1 for step in range(total))
