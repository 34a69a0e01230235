"""A launch that is not what it looks like is refused before anything waits for it."""

from __future__ import annotations

import pytest

from isicdist.processes import check_launch
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
