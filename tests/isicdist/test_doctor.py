"""The doctor finds what is wrong, says what to do about it, and never breaks itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from email.message import Message
from pathlib import Path

import pytest

from isicdist import doctor
from isicdist.cli import main
from isicdist.doctor import Check


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
    wanted |= {"gloo", "accelerate launch", "WORLD_SIZE", "JPEG"}
    assert wanted <= found.keys()
    assert [check for check in found.values() if check.state == "fail"] == []
    assert found["gloo"].found == "two processes found each other"
    assert all(check.advice for check in found.values() if check.state != "ok")
    assert "pytest" not in found, "a dependency of development is not one of the run"


@pytest.mark.parametrize(("states", "code"), [(["ok", "warn"], 0), (["ok", "fail", "warn"], 1)])
def test_only_a_failure_changes_the_exit_code(monkeypatch, capsys, states, code):
    found = [Check(name=f"[{state}]", state=state, found="a [b] c", advice="do [d]") for state in states]
    monkeypatch.setattr(doctor, "run_checks", lambda: found)
    assert doctor.run_doctor() == code
    printed = capsys.readouterr().out
    assert printed.count("a [b] c") == printed.count("do [d]") == len(states)


@pytest.mark.parametrize(("state", "code"), [("warn", 0), ("fail", 1)])
def test_json_is_one_object_and_nothing_else(monkeypatch, capsys, state, code):
    check = Check(name="disk", state=state, found="0.3 GiB free here", advice="make room")
    monkeypatch.setattr(doctor, "run_checks", lambda: [check])
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

    for name in ("_devices", "_processes"):
        monkeypatch.setattr(doctor, name, broken)
    found = {check.name: check for check in doctor.run_checks()}
    assert found["devices"].state == "fail"
    assert found["devices"].found == "OSError: libsomething.so: cannot open shared object file"
    assert found["JPEG"].state == "ok"


def test_versions_are_compared_with_the_installed_ranges(monkeypatch):
    metadata = Message()
    metadata["Requires-Python"] = ">=3.99"
    for requirement in ("numpy<1", "pillow>=1", "no-such-package>=2", "pytest<1; extra == 'dev'"):
        metadata["Requires-Dist"] = requirement
    monkeypatch.setattr(doctor.importlib.metadata, "metadata", lambda name: metadata)
    states = {check.name: check.state for check in doctor._versions()}
    assert states == {"python": "fail", "numpy": "fail", "pillow": "ok", "no-such-package": "fail"}
    numpy = one(doctor._versions, "numpy")
    assert numpy.found.endswith(", wanted <1")
    assert "constraints.txt" in numpy.advice


def test_a_missing_network_interface_is_named(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nope0")
    check = one(doctor._processes, "gloo")
    assert check.state == "fail"
    assert "nope0" in check.found
    assert "GLOO_SOCKET_IFNAME" in check.advice


def test_processes_that_never_answer_are_killed(monkeypatch):
    started = []
    popen = subprocess.Popen

    def remember(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(doctor.subprocess, "Popen", remember)
    monkeypatch.setattr(doctor, "_GLOO_PROCESS", "import time; time.sleep(100)")
    monkeypatch.setattr(doctor, "_GLOO_TIMEOUT", 1.0)
    check = one(doctor._processes, "gloo")
    assert (check.state, check.found) == ("fail", "no answer within 1 s")
    assert len(started) == 2
    assert all(process.poll() is not None for process in started)


def test_a_world_size_left_over_in_the_shell_fails(monkeypatch):
    assert one(doctor._launch, "WORLD_SIZE").state == "ok"
    monkeypatch.setenv("WORLD_SIZE", "2")
    left_over = one(doctor._launch, "WORLD_SIZE")
    assert left_over.state == "fail"
    assert left_over.advice.startswith("unset WORLD_SIZE")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert one(doctor._launch, "WORLD_SIZE").state == "warn"


def test_variables_that_a_run_would_refuse_are_found(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    found = one(doctor._environment, "environment")
    assert found.state == "fail"
    assert "ACCELERATE_USE_FSDP=true" in found.found
    assert "unset ACCELERATE_USE_FSDP" in found.advice
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    assert one(doctor._environment, "environment").state == "ok"


def test_accelerate_of_another_environment_or_none_is_a_warning(monkeypatch, tmp_path):
    other = tmp_path / "accelerate"
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "another environment" in one(doctor._launch, "accelerate launch").found
    other.unlink()
    missing = one(doctor._launch, "accelerate launch")
    assert (missing.state, missing.found) == ("warn", "not on PATH")
    assert str(Path(sys.executable).parent) in missing.advice


@pytest.mark.parametrize(("threads", "state"), [("1", "ok"), ("100000", "warn"), ("many", "warn"), ("0", "warn")])
def test_more_threads_than_cores_is_a_warning(monkeypatch, threads, state):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert one(doctor._threads, "cores").state == state


@pytest.mark.parametrize(("gib", "state"), [(50, "ok"), (2, "warn"), (0.1, "fail")])
def test_a_full_disk_is_found(monkeypatch, gib, state):
    size = int(gib * 2**30)
    usage = type(doctor.shutil.disk_usage("/"))(size, 0, size)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    assert one(doctor._disk_space, "disk").state == state


def test_wandb_online_without_a_login_is_a_warning(monkeypatch):
    monkeypatch.setattr("isicdist.training.tracking.resolve_wandb_mode", lambda: ("offline", "not logged in"))
    monkeypatch.setenv("WANDB_MODE", "online")
    assert one(doctor._wandb, "wandb").state == "warn"
    monkeypatch.delenv("WANDB_MODE")
    assert one(doctor._wandb, "wandb").state == "ok"
