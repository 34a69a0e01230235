"""The best evaluation, and patience."""

from __future__ import annotations

from isicdist.training.optim import EarlyStopping


def test_only_a_better_one_counts_and_patience_begins_anew():
    selection = EarlyStopping(patience=2)
    judged = [selection.better(dice) for dice in (0.0, 0.5, 0.5, 0.6, 0.1)]
    assert judged == [True, True, False, True, False]
    assert (selection.best, selection.since, selection.over) == (0.6, 1, False)
    selection.better(0.6)
    assert selection.over


def test_without_patience_nothing_ends():
    selection = EarlyStopping(patience=0, best=0.9, since=100)
    assert not selection.over
