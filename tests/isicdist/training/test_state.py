"""What may change between two starts of a run, and what may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from isicdist.config import OptimConfig, TrainConfig
from isicdist.training.state import changed_settings
from shards.errors import UsageError

RUN = Path("runs/one")


def record(**more: object) -> dict:
    return {**TrainConfig().to_json(), "data_digest": "abc", "world_size": 1, **more}


def test_each_change_is_one_line_and_no_change_is_none():
    after = {**record(world_size=2), "optim": TrainConfig(optim=OptimConfig(lr=0.001)).to_json()["optim"]}
    assert changed_settings(record(), after, RUN) == ["optim.lr 0.002 -> 0.001", "world_size 1 -> 2"]
    assert changed_settings(record(), record(), RUN) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data_digest": "def"}, "data_digest abc, and cannot go on with def"),
        ({"seed": 1}, "seed 0, and cannot go on with 1"),
        ({"model": {**record()["model"], "base_channels": 8}}, "model.base_channels 16, and cannot go on with 8"),
    ],
)
def test_what_the_run_stands_on_cannot_change(change, said):
    with pytest.raises(UsageError, match=f"^runs/one: trained with {said}; choose another --run"):
        changed_settings(record(), record(**change), RUN)
