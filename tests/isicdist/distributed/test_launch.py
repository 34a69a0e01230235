"""A launch that is not what it looks like is refused before anything waits for it; a lost rank is one line."""

from __future__ import annotations

import ctypes
import sys

import pytest
import torch
from accelerate import Accelerator

from isicdist.distributed import launch
from isicdist.distributed.agree import AnyRank, raise_on_lost_rank
from isicdist.distributed.environment import LaunchEnvironment
from isicdist.distributed.launch import LAUNCHER_GONE, stop_with_launcher
from isicdist.errors import TrainingError
from shards.errors import UsageError


@pytest.mark.slow
def test_accelerate_cpu_that_starts_one_process_for_two_is_refused_for_real(python, tmp_path):
    words = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1")
    words += ("--mixed_precision", "no", "-m", "isicdist", "train", "--data", tmp_path, "--run", tmp_path / "run")
    done = python(*words, anew=True)
    assert done.returncode != 0
    assert "started one process for several" in done.stderr
    assert not (tmp_path / "run").exists()


THREADS_AT_THE_END = """
import atexit, os, pathlib, sys
def names():
    return sorted(path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm"))
atexit.register(lambda: os.write(1, f"{names()}\\n".encode()))
from isicdist.distributed import launch
accelerator = launch.start()
import torch._dynamo  # as building a network does
if sys.argv[1] == "well":
    accelerator.end_training()
    os.write(1, f"{names()}\\n".encode())
else:
    sys.exit(3)
"""


@pytest.mark.parametrize("end", ["well", "badly"])
def test_no_thread_of_gloo_is_left_at_the_end_of_a_process(python, tmp_path, end):
    """Or the process may abort ("terminate called without an active exception"), and the launcher kills the others."""
    script = tmp_path / "script.py"
    script.write_text(THREADS_AT_THE_END)
    done = python(script, end, processes=2, anew=True)
    lists = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(lists) == (4 if end == "well" else 2), done.stderr
    assert not any("gloo" in line for line in lists)


VOTE_BESIDE_ANOTHER_BACKEND = """
import atexit, os, pathlib, sys
from types import SimpleNamespace
def names():
    return sorted(path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm"))
atexit.register(lambda: os.write(1, f"at the end {names()}\\n".encode()))
import torch.testing._internal.distributed.fake_pg
from isicdist.distributed.agree import AnyRank
torch.distributed.init_process_group("fake", store=torch.distributed.HashStore(), rank=0, world_size=1)
def run():  # of which nothing is left at the end, as of a run that an error has ended
    vote = AnyRank(SimpleNamespace(num_processes=2), timeout=9)
    print(vote(True, False), names(), flush=True)
run()
if sys.argv[1] == "destroyed":
    torch.distributed.destroy_process_group()
elif sys.argv[1] == "another":
    torch.distributed.destroy_process_group()
    torch.distributed.init_process_group("fake", store=torch.distributed.HashStore(), rank=0, world_size=1)
sys.exit(3)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")
@pytest.mark.parametrize("end", ["badly", "destroyed", "another"])
def test_the_votes_own_group_ends_beside_another_backend(python, tmp_path, end):
    """The backend of tests stands for NCCL, whose group is not destroyed at the end of a process."""
    script = tmp_path / "script.py"
    script.write_text(VOTE_BESIDE_ANOTHER_BACKEND)
    done = python(script, end, anew=True)
    voted, at_the_end = done.stdout.splitlines()
    assert voted.startswith("(True, False) [")
    assert "gloo" in voted
    assert at_the_end.startswith("at the end [")
    assert "gloo" not in at_the_end
    assert (done.returncode, done.stderr) == (3, "")


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_a_cpu_computes_in_the_precision_that_is_faster_on_it(python, precision):
    program = f"""
from isicdist.distributed import launch
print(launch.start(probe_cpu=lambda: {precision!r}).mixed_precision)
"""
    done = python("-c", program, env={"ACCELERATE_MIXED_PRECISION": "bf16"}, anew=True)
    assert done.stdout.split() == [precision], done.stderr
    assert ("bf16 is slower than float32 on this CPU" in done.stderr) is (precision == "no")


@pytest.mark.parametrize(
    ("name", "value"),
    [("ACCELERATE_USE_FSDP", "true"), ("WORLD_SIZE", "two")],
)
def test_a_variable_left_over_in_the_shell_is_one_line_and_no_traceback(python, tmp_path, name, value):
    words, left_over = ("--data", tmp_path, "--checkpoint", tmp_path), {name: value}
    done = python("-m", "isicdist", "evaluate", *words, env=left_over, anew=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {name} is ")
    assert done.stderr.count("\n") == 1
    assert python("-m", "isicdist", "--help", env=left_over, anew=True).returncode == 0


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    launched = LaunchEnvironment(world_size=8, local_world_size=8, use_cpu=False, mixed_precision="bf16")
    with pytest.raises(UsageError, match=r"8 processes on this machine, which has 4 GPU.*--num_processes 4"):
        launch._check_devices(launched, cpu=False)


def test_what_torch_compile_lacks_on_a_gpu_is_named(monkeypatch, tmp_path):
    gpu, present = torch.device("cuda"), {"gcc", "my-cc"}
    include = tmp_path / "include"
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(launch, "has_triton", lambda: True)
    monkeypatch.setattr(launch.shutil, "which", lambda name: name if name in present else None)
    monkeypatch.setattr(launch.sysconfig, "get_path", lambda name, scheme: str(include))
    assert launch.decide_compile("auto", gpu) == (
        False,
        f"network: not compiled: no Python.h in {include}: install Python's headers (Debian: python3-dev)",
    )
    include.mkdir()
    (include / "Python.h").touch()
    assert launch.lacking_for_compile(gpu) is None
    assert launch.decide_compile("auto", gpu)[0]
    assert launch.decide_compile("off", gpu) == (False, "network: not compiled: --compile off")
    monkeypatch.setenv("CC", "my-cc")
    assert launch.lacking_for_compile(gpu) is None
    monkeypatch.setenv("CC", "other-cc")  # Triton would take it, though gcc is there
    assert "CC=other-cc" in launch.decide_compile("auto", gpu)[1]
    monkeypatch.delenv("CC")
    present.clear()
    assert "install gcc" in launch.decide_compile("auto", gpu)[1]
    assert launch.decide_compile("on", gpu)[0]
    monkeypatch.setattr(launch, "has_triton", lambda: False)
    assert "Triton" in launch.decide_compile("auto", gpu)[1]
    assert not launch.decide_compile("auto", torch.device("cpu"))[0]


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


def test_fp16_on_a_cpu_is_refused():
    launched = LaunchEnvironment(world_size=1, local_world_size=1, use_cpu=True, mixed_precision="fp16")
    with pytest.raises(UsageError, match="fp16 needs a GPU"):
        launch._check_devices(launched, cpu=True)


@pytest.mark.parametrize(
    ("asked", "device", "cores", "ranks", "threads"),
    [("auto", "cpu", 64, "1", 2), ("auto", "cuda", 64, "2", 8), ("auto", "cuda", 4, "4", 2), (5, "cuda", 64, "1", 5)],
)
def test_decoding_threads_share_the_cores_of_a_machine(monkeypatch, asked, device, cores, ranks, threads):
    monkeypatch.setattr(launch, "available_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert launch.decoding_threads(asked, torch.device(device)) == threads


def test_tf32_is_what_the_environment_says(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    assert launch.computes_tf32(torch.device("cuda"))
    assert not launch.computes_tf32(torch.device("cpu"))
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert not launch.computes_tf32(torch.device("cuda"))


@pytest.mark.parametrize("timeout", [600, 601])
def test_the_timeout_reaches_the_process_group(monkeypatch, timeout):
    """accelerate leaves out what is equal to its default, 600 s, and torch has another one for NCCL."""
    given = {}

    def started(**options: object) -> None:
        given.update(options)
        raise InterruptedError

    monkeypatch.setattr(launch, "PartialState", started)
    with pytest.raises(InterruptedError):
        launch.start(timeout)
    assert timeout <= given["timeout"].total_seconds() < timeout + 1


@pytest.mark.parametrize(("ranks", "threads"), [(None, 12), ("1", 12), ("4", 3), ("12", 2)])
def test_an_evaluation_decodes_on_the_cores_of_its_rank(monkeypatch, ranks, threads):
    monkeypatch.setattr(launch, "available_cores", lambda: 12)
    if ranks is None:
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert launch.worker_threads() == threads
