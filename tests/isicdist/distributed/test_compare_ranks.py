"""Ranks that do not see the same data, settings or versions are named before they train."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
from accelerate import Accelerator

from isicdist.distributed import compare_ranks as module
from isicdist.distributed.compare_ranks import RankReport, compare_ranks, difference
from isicdist.errors import TrainingError
from shards.errors import ShardSetError

ADVICE = "; give all machines the same command, data and versions"


def reports(*facts: dict[str, object]) -> list[RankReport]:
    return [RankReport(host=f"node-{rank // 2}", facts=each) for rank, each in enumerate(facts)]


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ([{"seed": 0}] * 4, None),
        ([{"seed": 0}, {"seed": 0}, {"seed": 0}, {"seed": 1}], "seed is 1 on rank 3 (node-1), 0 on the others"),
        ([{"seed": 1}, {"seed": 0}, {"seed": 0}], "seed is 1 on rank 0 (node-0), 0 on the others"),
        ([{"seed": 0}, {"seed": 1}], "seed is 1 on rank 1 (node-0), 0 on the others"),
        ([{"a": 1, "b": 2}, {"a": 1}], "b is not set on rank 1 (node-0), 2 on the others"),
        (
            [{"seed": 0}] * 7 + [{"seed": 1}] * 6,
            "seed is 1 on rank 7 (node-3), rank 8 (node-4), rank 9 (node-4), rank 10 (node-5) and 2 more, "
            "0 on the others",
        ),
        (
            [dict.fromkeys("abcdef", 0), dict.fromkeys("abcdef", 1)],
            "; ".join(f"{name} is 1 on rank 1 (node-0), 0 on the others" for name in "abcd") + "; and 2 more",
        ),
        (
            [dict.fromkeys("abcd", 0), dict.fromkeys("abcd", 1)],
            "; ".join(f"{name} is 1 on rank 1 (node-0), 0 on the others" for name in "abcd"),
        ),
    ],
)
def test_the_rank_that_differs_is_named_with_its_host(facts, said):
    assert difference(reports(*facts)) == (said and f"ranks differ: {said}{ADVICE}")


def test_one_process_compares_nothing_and_keeps_its_error():
    accelerator = Accelerator(cpu=True)
    with compare_ranks(accelerator) as facts:
        facts["seed"] = 0
    with pytest.raises(ShardSetError, match=r"^nowhere$"), compare_ranks(accelerator):
        raise ShardSetError("nowhere")


def test_every_rank_prints_the_same_line_when_one_has_another_setting_or_no_data(python, shard_set, tmp_path):
    """On rank 1 of two, a flag has another value, as where the command is typed on each machine."""
    script = tmp_path / "rank_1_differs.py"
    script.write_text(
        "import os, sys\nfrom isicdist.cli import main\n_, flag, value, *words = sys.argv\n"
        "if os.environ['RANK'] == '1':\n    words[words.index(flag) + 1] = value\nmain(words)\n"
    )
    train = ("train", "--data", shard_set, "--run", tmp_path / "run", "--seed", 0)
    for flag, value, said in (
        ("--seed", 5, "ranks differ: seed is 5 on rank 1 ("),
        ("--data", tmp_path / "no-set", f"{tmp_path / 'no-set'}: there is no such folder"),
    ):
        done = python(script, flag, value, *train, processes=2)
        assert done.returncode == 1
        errors = [line.split(": ", 2) for line in done.stderr.splitlines() if line.startswith("error: rank ")]
        assert {rank for _, rank, _ in errors} == {"rank 0", "rank 1"}, done.stderr
        assert len({line for _, _, line in errors}) == 1
        assert said in errors[0][2]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("error", [ShardSetError("nowhere"), PermissionError("no rights")])
def test_an_error_is_raised_on_every_rank_and_as_it_is_where_all_have_it(monkeypatch, error):
    """A rank that raised it alone would leave the others waiting."""
    both = cast(Accelerator, SimpleNamespace(num_processes=2))
    well, badly = (RankReport(host="b", facts={}, error=said) for said in (None, str(error)))
    monkeypatch.setattr(module, "gather_object", lambda mine: [*mine, well])
    with pytest.raises(TrainingError, match=rf"^rank 0 \(.*\): {error}$"), compare_ranks(both):
        raise error
    monkeypatch.setattr(module, "gather_object", lambda mine: [*mine, badly])
    with pytest.raises(TrainingError, match=rf"^rank 1 \(b\): {error}$"), compare_ranks(both):
        pass
    with pytest.raises(type(error), match=f"^{error}$"), compare_ranks(both):
        raise error
