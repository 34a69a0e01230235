"""The doctor finds what is wrong, says what to do about it, and never breaks itself."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from email.message import Message
from pathlib import Path

import pytest
import torch

from isicdist import doctor
from isicdist.cli import main
from isicdist.config import BatchConfig, ModelConfig, StreamConfig, TrainConfig
from isicdist.data.stream import Batch
from isicdist.distributed.scaling_model import Rates
from isicdist.doctor import machine, network, software, throughput
from isicdist.doctor.check import Check
from isicdist.doctor.table import merge_ranks
from isicdist.doctor.throughput import forecast
from isicdist.train import Trainer


def one(checks: Callable[[], Iterator[Check]], name: str) -> Check:
    (check,) = [check for check in checks() if check.name == name]
    return check


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in ("WORLD_SIZE", "OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID", "WANDB_API_KEY", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def test_everything_is_checked_and_this_machine_is_fit():
    found = {check.name: check for check in doctor.run_checks()}
    wanted = {"python", "torch", "accelerate", "webdataset", "simplejpeg", "wandb", "GPUs", "cores", "disk"}
    wanted |= {"open files", "cache", "all-reduce", "accelerate launch", "WORLD_SIZE", "JPEG", "wandb mode"}
    assert wanted <= found.keys()
    assert [check for check in found.values() if check.state == "fail"] == []
    assert found["all-reduce"].numbers["bandwidth_bytes_per_s"] > 1e6
    assert 0 < found["all-reduce"].numbers["latency_s"] < found["all-reduce"].numbers["seconds"]
    assert all(check.advice for check in found.values() if check.state != "ok")
    assert "pytest" not in found, "a dependency of development is not one of the run"


@pytest.mark.parametrize(("states", "code"), [(["ok", "warn"], 0), (["ok", "fail", "warn"], 1)])
def test_only_a_failure_changes_the_exit_code(monkeypatch, capsys, states, code):
    found = [Check(name=f"[{state}]", state=state, found="a [b] c", advice="do [d]") for state in states]
    monkeypatch.setattr(doctor, "run_checks", lambda data, accelerator: found)
    assert doctor.run_doctor() == code
    printed = capsys.readouterr().out
    assert printed.count("a [b] c") == printed.count("do [d]") == len(states)


@pytest.mark.parametrize(("state", "code"), [("warn", 0), ("fail", 1)])
def test_json_is_one_object_and_nothing_else(monkeypatch, capsys, state, code):
    check = Check(name="disk", state=state, found="0.3 GiB free here", advice="make room")
    monkeypatch.setattr(doctor, "run_checks", lambda data, accelerator: [check])
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--json"])
    assert ended.value.code == code
    assert json.loads(capsys.readouterr().out) == {
        "ok": state != "fail",
        "checks": [{"name": "disk", "state": state, "found": "0.3 GiB free here", "advice": "make room"}],
    }


def test_a_check_that_raises_has_failed(monkeypatch):
    def broken() -> Iterator[Check]:
        raise OSError("libsomething.so: cannot open\nshared object file")
        yield

    monkeypatch.setattr(machine, "check_devices", broken)
    monkeypatch.setattr(network, "check_link", broken)
    found = {check.name: check for check in doctor.run_checks()}
    assert found["devices"].state == "fail"
    assert found["devices"].found == "OSError: libsomething.so: cannot open shared object file"
    assert found["JPEG"].state == "ok"


def test_versions_are_compared_with_the_installed_ranges(monkeypatch):
    metadata = Message()
    metadata["Requires-Python"] = ">=3.99"
    for requirement in ("numpy<1", "pillow>=1", "no-such-package>=2", "pytest<1; extra == 'dev'"):
        metadata["Requires-Dist"] = requirement
    monkeypatch.setattr(software.importlib.metadata, "metadata", lambda name: metadata)
    states = {check.name: check.state for check in software.check_versions()}
    assert states == {"python": "fail", "numpy": "fail", "pillow": "ok", "no-such-package": "fail"}
    numpy = one(software.check_versions, "numpy")
    assert numpy.found.endswith(", wanted <1")
    assert "constraints.txt" in numpy.advice


def test_a_missing_network_interface_is_named(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nope0")
    check = one(lambda: network.check_link(None), "all-reduce")
    assert check.state == "fail"
    assert "nope0" in check.found
    assert "GLOO_SOCKET_IFNAME" in check.advice


def test_processes_that_never_answer_are_killed(monkeypatch):
    started = []
    popen = subprocess.Popen

    def remember(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(network.subprocess, "Popen", remember)
    monkeypatch.setattr(network, "_PAIR_PROGRAM", "import time; time.sleep(100)")
    monkeypatch.setattr(network, "_PAIR_TIMEOUT", 1.0)
    check = one(lambda: network.check_link(None), "all-reduce")
    assert (check.state, check.found) == ("fail", "no answer within 1 s")
    assert len(started) == 2
    assert all(process.poll() is not None for process in started)


def test_a_world_size_left_over_in_the_shell_fails(monkeypatch):
    assert one(software.check_launcher, "WORLD_SIZE").state == "ok"
    monkeypatch.setenv("WORLD_SIZE", "2")
    left_over = one(software.check_launcher, "WORLD_SIZE")
    assert left_over.state == "fail"
    assert left_over.advice.startswith("unset WORLD_SIZE")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert one(software.check_launcher, "WORLD_SIZE").found == "2: every rank is checked"


def test_variables_that_a_run_would_refuse_are_found(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    found = one(software.check_environment, "environment")
    assert found.state == "fail"
    assert "ACCELERATE_USE_FSDP=true" in found.found
    assert "unset ACCELERATE_USE_FSDP" in found.advice
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    assert one(software.check_environment, "environment").state == "ok"


def test_accelerate_of_another_environment_or_none_is_a_warning(monkeypatch, tmp_path):
    other = tmp_path / "accelerate"
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "another environment" in one(software.check_launcher, "accelerate launch").found
    other.unlink()
    missing = one(software.check_launcher, "accelerate launch")
    assert (missing.state, missing.found) == ("warn", "not on PATH")
    assert str(Path(sys.executable).parent) in missing.advice


@pytest.mark.parametrize(("threads", "state"), [("1", "ok"), ("100000", "warn"), ("many", "warn"), ("0", "warn")])
def test_more_threads_than_cores_is_a_warning(monkeypatch, threads, state):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert one(machine.check_cores, "cores").state == state


@pytest.mark.parametrize(("gib", "state"), [(50, "ok"), (2, "warn"), (0.1, "fail")])
def test_a_full_disk_is_found(monkeypatch, gib, state):
    size = int(gib * 2**30)
    usage = type(machine.shutil.disk_usage("/"))(size, 0, size)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage)
    assert one(machine.check_memory_and_disk, "disk").state == state


def test_wandb_online_without_a_login_is_a_warning(monkeypatch):
    monkeypatch.setattr("isicdist.training.tracking.resolve_wandb_mode", lambda: ("offline", "not logged in"))
    monkeypatch.setenv("WANDB_MODE", "online")
    assert one(software.check_wandb, "wandb mode").state == "warn"
    monkeypatch.delenv("WANDB_MODE")
    assert one(software.check_wandb, "wandb mode").state == "ok"


def test_few_open_files_and_a_cache_that_cannot_be_written_are_warnings(monkeypatch, tmp_path):
    monkeypatch.setattr(machine.resource, "getrlimit", lambda kind: (64, 4096))
    files = one(machine.check_open_files, "open files")
    assert (files.state, files.advice) == ("warn", "ulimit -n 4096")
    (tmp_path / "file").touch()
    monkeypatch.setenv("ISICDIST_CACHE", str(tmp_path / "file" / "cache"))
    cache = one(machine.check_cache, "cache")
    assert cache.state == "warn"
    assert "Not a directory" in cache.found
    monkeypatch.setenv("ISICDIST_CACHE", str(tmp_path / "cache"))
    cache = one(machine.check_cache, "cache")
    assert cache.numbers["write_bytes_per_s"] > 1e6
    assert str(tmp_path / "cache") in cache.found


def test_more_ranks_than_cores_name_what_srun_needs(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(machine, "available_cores", lambda: 1)
    assert "srun --cpus-per-task" in one(machine.check_cores, "cores").advice


def test_ranks_that_agree_have_one_row_and_the_odd_one_is_named():
    same = Check(name="torch", state="ok", found="2.13")
    odd = Check(name="torch", state="fail", found="2.12, wanted >=2.13", advice="install it")
    assert merge_ranks([[same]] * 3) == [same]
    merged = merge_ranks([[same], [same], [odd], [same]])
    assert [(check.state, check.found) for check in merged] == [
        ("ok", "ranks 0-1 3: 2.13"),
        ("fail", "rank 2: 2.12, wanted >=2.13"),
    ]
    sixes = [[Check(name="cache", state="ok", found=str(rank))] for rank in range(6)]
    assert merge_ranks(sixes)[0].found == "rank 0: 0; rank 1: 1; rank 2: 2; rank 3: 3; 2 other findings"


@pytest.mark.parametrize(
    ("changed", "bound", "advice"),
    [
        ({}, "compute", ""),
        ({"decode_images_per_s": 10.0}, "data", "--stream.workers 10"),
        ({"bandwidth_bytes_per_s": 1e6}, "network", "global-size"),
    ],
)
def test_the_resource_that_bounds_a_step_is_named_with_a_remedy(changed, bound, advice):
    rates = dataclasses.replace(
        Rates(
            compute_images_per_s=100.0,
            decode_images_per_s=500.0,
            decode_threads=2,
            gradient_bytes=12_800_000,
            bandwidth_bytes_per_s=1e9,
            latency_s=1e-4,
        ),
        **changed,
    )
    found = {check.name: check for check in forecast(rates, samples=320, global_size=16, world_size=2)}
    assert found["bound"].found.startswith(bound)
    assert advice in found["bound"].advice
    assert bool(advice) == (found["bound"].state == "warn")
    if not changed:  # 20 steps of 8 samples a rank: 80 ms, and 2 messages of 6.4 MB
        assert found["epoch"].numbers["on_1_s"] == pytest.approx(20 * 0.16)
        assert found["epoch"].numbers["on_8_s"] == pytest.approx(20 * (0.02 + 14 * (1.6e6 / 1e9 + 1e-4)))


def test_the_speed_is_measured_with_as_many_images_as_fit(shard_set, tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "_SECONDS", 0.0)
    config = TrainConfig(
        batch=BatchConfig(global_size=8), stream=StreamConfig(decoded_cache="off"), model=ModelConfig(base_channels=2)
    )
    trainer = Trainer(config, str(shard_set), tmp_path / "run")
    forward_backward, sizes = trainer.forward_backward, list[int]()

    def limited(batch: Batch) -> None:
        sizes.append(len(batch.images))
        forward_backward(batch)
        if len(batch.images) > 2:  # with gradients already
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer, "forward_backward", limited)
    assert throughput._compute_rate(trainer) > 0
    assert sizes == [8, 4, 2, 2, 2]  # the last three warm up, give the number of passes, and are timed
    assert trainer.stream.plan.micro_size == 2
    assert all(p.grad is None for p in trainer.model.parameters())


def test_a_choice_of_interface_follows_the_order_of_nccl():
    assert network.nccl_interface(["lo", "docker0", "eth0", "ib0"]) == "ib0"
    assert network.nccl_interface(["lo", "docker0", "eth0"]) == "eth0"
    assert network.nccl_interface(["lo"]) == "lo"
    assert network.nccl_interface([]) is None


def test_every_rank_is_checked_and_the_speed_of_a_set_is_measured(python, shard_set):
    done = python("-m", "isicdist", "doctor", "--data", shard_set, "--json", processes=2)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    found = {check["name"]: check for check in printed["checks"]}
    assert printed["ok"]
    assert found["rendezvous"]["found"].startswith("2 ranks on 1 machine at 127.0.0.1:")
    assert {"interface", "clocks", "decoding", "step", "bound", "decoding threads"} <= found.keys()
    assert found["epoch"]["numbers"].keys() == {"on_1_s", "on_8_s", "on_64_s"}
    assert "2 ranks" in found["all-reduce"]["found"]


def test_a_set_that_is_not_there_fails_on_one_process(python, tmp_path):
    done = python("-m", "isicdist", "doctor", "--data", tmp_path / "nope")
    assert done.returncode == 1
    assert "a run would end so" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
