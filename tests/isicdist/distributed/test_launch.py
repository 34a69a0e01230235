"""A launch that is not what it looks like is refused before anything waits for it; a lost rank is one line."""

from __future__ import annotations

import ctypes
import sys

import pytest
import torch
from accelerate import Accelerator

from isicdist.distributed.agree import AnyRank, raise_on_lost_rank
from isicdist.distributed.launch import LAUNCHER_GONE, check_launch, stop_with_launcher
from isicdist.errors import TrainingError
from shards.errors import UsageError

LAUNCHED = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


def test_a_real_launch_and_a_plain_start_are_taken():
    check_launch(LAUNCHED)
    check_launch({})
    check_launch({"WORLD_SIZE": "1"})


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "MASTER_ADDR"])
def test_a_world_size_left_over_in_a_shell_is_refused(missing):
    with pytest.raises(UsageError, match="WORLD_SIZE is 2"):
        check_launch({name: value for name, value in LAUNCHED.items() if name != missing})


def test_one_process_started_for_two_is_refused():
    with pytest.raises(UsageError, match="started one process for several"):
        check_launch({"MASTER_ADDR": "127.0.0.1"})


def test_accelerate_cpu_that_starts_one_process_for_two_is_refused_for_real(python, tmp_path):
    words = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1")
    words += ("--mixed_precision", "no", "-m", "isicdist", "train", "--data", tmp_path, "--run", tmp_path / "run")
    done = python(*words)
    assert done.returncode != 0
    assert "started one process for several" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("has", "precision"), [(True, "bf16"), (False, "no")])
def test_a_cpu_without_bf16_computes_in_float32_and_says_so(python, has, precision):
    program = f"""
from isicdist.distributed import launch
launch.cpu_has_bf16 = lambda: {has}
print(launch.start().mixed_precision)
"""
    done = python("-c", program, env={"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert done.stdout.split() == [precision], done.stderr
    assert ("no instructions for bf16: computing in float32" in done.stderr) is not has


def test_a_lost_rank_is_said_in_one_line_and_other_errors_pass():
    gloo = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:14040. See"
    with pytest.raises(TrainingError) as caught, raise_on_lost_rank():
        raise RuntimeError(gloo)
    assert "or does not answer (Connection closed by peer [127.0.0.1]:14040); its own line" in str(caught.value)
    with pytest.raises(TrainingError, match="another rank has gone"), raise_on_lost_rank():
        raise torch.distributed.DistNetworkError("reset")
    with pytest.raises(RuntimeError, match=r"^shapes$"), raise_on_lost_rank():
        raise RuntimeError("shapes")


def test_a_process_alone_votes_alone():
    vote = AnyRank(Accelerator(cpu=True), timeout=1)
    assert vote(True, False) == (True, False)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_only_a_process_with_a_launcher_ends_with_it():
    told = ctypes.c_int()

    def signal_of_this_process() -> int:
        ctypes.CDLL(None).prctl(2, ctypes.byref(told))  # PR_GET_PDEATHSIG
        return told.value

    assert signal_of_this_process() == 0
    stop_with_launcher({"WORLD_SIZE": "1"})
    assert signal_of_this_process() == 0
    try:
        stop_with_launcher({"TORCHELASTIC_RUN_ID": "none"})
        assert signal_of_this_process() == LAUNCHER_GONE
    finally:
        ctypes.CDLL(None).prctl(1, 0)
