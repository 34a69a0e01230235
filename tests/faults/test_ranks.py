"""One rank of two runs out of memory, computes NaN, dies, or hangs: what becomes of the others and of the run."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from isicdist.training.checkpoint import newest
from tests.faults.conftest import FULL, WORKER, Launch, Tally, both_ranks, full_only, wait_for

WORDS = ("--epochs", 9, "--batch.global-size", 6, "--model.base-channels", 4, "--log-every", 1, "--checkpoint-every", 1)


def lines(run: Path) -> list[dict]:
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "train"]


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def test_out_of_memory_on_one_rank_makes_all_micro_batches_smaller(python, shard_set, tmp_path):
    """Share 3, so micro batches of 3, then 2, then 1: the same samples, and the same weights as on one process."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train = ("train", "--data", shard_set, "--steps", 3, *WORDS)
    done = python(WORKER, "nan", 0, 0, *train, "--run", whole, env={"DTYPE": "float64"})
    assert done.returncode == 0, done.stderr
    done = python(WORKER, "out_of_memory", 2, 9, *train, "--run", cut, processes=2, env={"DTYPE": "float64"})
    assert done.returncode == 0, done.stderr
    assert "out of memory in step 2: now 2 samples at once" in done.stdout
    assert "out of memory in step 2: now 1 samples at once" in done.stdout
    assert [line["samples"] for line in lines(cut)] == [6, 12, 18]
    assert [line["loss"] for line in lines(cut)] == pytest.approx([line["loss"] for line in lines(whole)], abs=1e-9)
    for name, weight in weights(whole, 3).items():
        torch.testing.assert_close(weights(cut, 3)[name], weight, rtol=0, atol=1e-9)


def test_nan_on_one_rank_leaves_steps_out_on_all_and_ends_the_run_when_it_stays(python, shard_set, tmp_path):
    run = tmp_path / "run"
    words = ("--data", shard_set, "--run", run, *WORDS, "--max-nonfinite-steps", 1, "--keep", 9, "--steps")
    done = python(WORKER, "nan", 3, 3, "train", *words, 5, processes=2)
    assert done.returncode == 0, done.stderr
    assert [line["skipped"] for line in lines(run)] == [0, 0, 1, 0, 0]
    assert lines(run)[2]["loss"] is None
    before, skipped, after = (weights(run, step)["stem.weight"] for step in (2, 3, 4))
    assert torch.equal(before, skipped)
    assert not torch.equal(skipped, after)
    assert after.isfinite().all()

    # Two steps more, and both are bad: one more than is borne, which is known one step later.
    done = python(WORKER, "nan", 1, 9, "train", *words, 10, processes=2)
    assert done.returncode == 1
    said = set(re.findall(r"rank \d: (loss or gradient not finite in 2 steps in a row.*)", done.stderr))
    assert len(said) == 1, done.stderr
    assert re.search(r"the last one step 7 with samples ISIC_\d{7}, ", said.pop())
    assert torch.equal(weights(run, 5)["stem.weight"], weights(run, 7)["stem.weight"])


@full_only
def test_a_rank_that_hangs_is_given_up(launched, tmp_path):
    launched("hang", 3, *WORDS, "--timeout", 3)
    text = wait_for("does not answer", tmp_path / "said")
    assert re.search(
        rf"error: rank 0: another rank \(1 on {platform.node()}\) has .* \(Timed out waiting 3000ms.*\); its own line",
        text,
    ), text


@full_only
def test_without_their_launcher_the_ranks_save_and_go(launched, tmp_path):
    process = launched("nan", 9999, *WORDS)
    wait_for("step 3", tmp_path / "said")
    ranks = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert not alive
    assert (tmp_path / "run" / "REQUEUE").exists()
    assert set(re.findall(r"rank (\d): stopped by a signal", (tmp_path / "said").read_text())) == {"0", "1"}


LAUNCHER_GRACE_SECONDS = 30
"""After this time the launcher kills a rank that SIGTERM has not ended."""
MOMENTS = [("step", 3), ("start", 1), ("evaluation", 2), ("save", 3)]
CAUSES = {
    "kill": r"rank +: {rank} .*\n.*exitcode +: -9 .*\(SIGKILL\)",
    "corrupt": r"error: rank {rank}: 000003.tar: ISIC_0000007.jpg",
    "freeze": r"another rank \({rank} on .*\) has gone or does not answer",
}
NAMES = {"kill": "SIGKILL", "corrupt": "exception", "freeze": "SIGSTOP"}


@pytest.mark.parametrize(("moment", "call"), MOMENTS if FULL else MOMENTS[:1])
@pytest.mark.parametrize("fault", CAUSES if FULL else ["kill"])
def test_a_fault_of_one_rank_at_any_moment_ends_the_others_and_it_is_named(
    launched: Launch, tmp_path: Path, fault: str, moment: str, call: int, tally: Tally
):
    timeout, noticing = 5, 15  # seconds: to find out which rank it is, and to end
    faulty = 0 if moment == "save" else 1
    process = launched(f"{fault}@{moment}", call, *WORDS, "--eval-every", 2, "--timeout", timeout)
    ranks = both_ranks(process)
    wait_for("here comes the fault", tmp_path / "said")
    _, alive = psutil.wait_procs([ranks[1 - faulty]], timeout=timeout + noticing if fault == "freeze" else 10)
    assert not alive
    process.wait(timeout=LAUNCHER_GRACE_SECONDS + 10)
    assert process.returncode
    assert not psutil.wait_procs(ranks, timeout=5)[1]
    said = (tmp_path / "said").read_text()
    assert re.search(CAUSES[fault].format(rank=faulty), said), said
    checkpoint = newest(tmp_path / "run", warn=pytest.fail)
    assert (checkpoint is None) == (moment == "start")
    tally(f"one rank: {NAMES[fault]}, at the start, in a step, an evaluation, a save", 1)
