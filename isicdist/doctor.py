"""Check the machine: versions, GPUs, bf16, NCCL, gloo, OMP_NUM_THREADS, disk, the launcher and wandb.

A check tries a thing rather than compare its version where it can: two processes all-reduce over gloo, and a JPEG is
encoded and decoded.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shards.errors import UsageError
from shards.parallel.processes import available_cores

State = Literal["ok", "warn", "fail"]

_GLOO_TIMEOUT = 60.0  # seconds, for both processes to start, import torch and answer
_GIB = 2**30
_INSTALL = "pip install -c constraints.txt -e ."

# One of two ranks: prints the all-reduced sum of rank + 1, which is 3.
_GLOO_PROCESS = """
import datetime, sys
import torch
import torch.distributed as dist
dist.init_process_group(
    "gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=2,
    timeout=datetime.timedelta(seconds=float(sys.argv[3])),
)
number = torch.tensor(int(sys.argv[2]) + 1)
dist.all_reduce(number)
print(number.item())
dist.destroy_process_group()
"""


@dataclass(frozen=True, kw_only=True)
class Check:
    """Result of one check."""

    name: str
    """Name of the thing checked."""
    state: State
    """ok; warn: training works, but slower or other than intended; fail: it does not work."""
    found: str
    """Version or finding, in one line."""
    advice: str = ""
    """Remedy, in one line; empty for ok."""


def run_doctor(*, as_json: bool = False) -> int:
    """Print every check on stdout; return the exit code, 1 if any check failed, else 0.

    The checks are a table, or with `as_json` one object: `{"ok": true, "checks": [{"name": ..., "state": ...,
    "found": ..., "advice": ...}, ...]}`.
    """
    if as_json:
        results = run_checks()
    else:
        console = Console()
        with console.status("Checking this machine, and starting two processes on it"):
            results = run_checks()
        console.print(_table(results))
    ok = all(check.state != "fail" for check in results)
    if as_json:
        print(json.dumps({"ok": ok, "checks": [dataclasses.asdict(check) for check in results]}, indent=1))
    return 0 if ok else 1


def _table(results: list[Check]) -> Table:
    table = Table("check", "")
    table.add_column("found", overflow="fold")
    table.add_column("what to do", overflow="fold")
    for check in results:
        style = {"ok": "green", "warn": "yellow", "fail": "bold red"}[check.state]
        table.add_row(check.name, f"[{style}]{check.state}[/]", escape(check.found), escape(check.advice))
    return table


def run_checks() -> list[Check]:
    """Run all checks, in the order of the table. A check that raises has failed."""
    checks: list[tuple[str, Callable[[], Iterator[Check]]]] = [
        ("versions", _versions),
        ("devices", _devices),
        ("threads", _threads),
        ("memory and disk", _disk_space),
        ("processes", _processes),
        ("launch", _launch),
        ("environment", _environment),
        ("JPEG", _jpeg),
        ("wandb", _wandb),
    ]
    results: list[Check] = []
    for name, check in checks:
        try:
            results.extend(check())
        except Exception as error:  # shown in the table next to the other results
            line = " ".join(f"{type(error).__name__}: {error}".split())
            results.append(Check(name=name, state="fail", found=line, advice=_INSTALL))
    return results


def _versions() -> Iterator[Check]:
    """Compare Python and every dependency with the version ranges of this installation's metadata."""
    try:
        metadata = importlib.metadata.metadata("isicdist")
    except importlib.metadata.PackageNotFoundError:
        yield Check(name="isicdist", state="fail", found="not installed", advice=_INSTALL)
        return
    wanted = SpecifierSet(metadata["Requires-Python"])
    version = ".".join(map(str, sys.version_info[:3]))
    fits = version in wanted
    yield Check(
        name="python",
        state="ok" if fits else "fail",
        found=version if fits else f"{version}, wanted {wanted}",
        advice="" if fits else f"make the environment with Python {wanted}",
    )
    for text in metadata.get_all("Requires-Dist") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        fits = version is not None and requirement.specifier.contains(version, prereleases=True)
        yield Check(
            name=requirement.name,
            state="ok" if fits else "fail",
            found=version if fits and version else f"{version or 'not installed'}, wanted {requirement.specifier}",
            advice="" if fits else _INSTALL,
        )


def _devices() -> Iterator[Check]:
    """Look for GPUs, bf16 on the device that trains, and NCCL."""
    import torch
    from torch import distributed
    from torch.cuda import nccl

    from isicdist.network.cpu_precision import probe_cpu_precision

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        unused_gpu = torch.version.cuda is None and Path("/dev/nvidia0").exists()
        yield Check(
            name="GPUs",
            state="warn" if unused_gpu else "ok",
            found="a GPU, but this torch is built for the CPU" if unused_gpu else "none; training runs on the CPU",
            advice="install torch's CUDA build" if unused_gpu else "",
        )
        probed = probe_cpu_precision()
        if not probed.gain:
            found = "not in this CPU: float32 is used instead"
        elif probed.precision == "bf16":
            found = f"used where asked for: a training step is {probed.gain:.2f} times as fast as in float32"
        else:
            found = f"float32 is used instead: in bf16 a training step is {probed.gain:.2f} times as fast"
        yield Check(name="bf16", state="ok", found=found)
        return
    names = sorted({torch.cuda.get_device_name(index) for index in range(count)})
    yield Check(name="GPUs", state="ok", found=f"{count}: {', '.join(names)}")
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    yield Check(
        name="bf16",
        state="ok" if bf16 else "warn",
        found="supported" if bf16 else "not in this GPU's hardware",
        advice="" if bf16 else "accelerate launch --mixed_precision fp16",
    )
    available = distributed.is_nccl_available()
    yield Check(
        name="nccl",
        state="ok" if available else "warn" if count == 1 else "fail",
        found=".".join(map(str, nccl.version())) if available else "not in this torch",
        advice="" if available else "install torch's CUDA build for Linux to train on several GPUs",
    )


def _threads() -> Iterator[Check]:
    """Compare OMP_NUM_THREADS with the cores of this process's CPU affinity."""
    cores = available_cores()
    threads = os.environ.get("OMP_NUM_THREADS", "")
    fits = not threads or (threads.isdecimal() and 1 <= int(threads) <= cores)
    setting = (
        f"OMP_NUM_THREADS={threads} for each process" if threads else "OMP_NUM_THREADS not set: the launcher decides"
    )
    yield Check(
        name="cores",
        state="ok" if fits else "warn",
        found=f"{cores}; {setting}",
        advice="" if fits else "unset OMP_NUM_THREADS, or set it to cores / processes",
    )


def _disk_space() -> Iterator[Check]:
    """Measure the shared memory that NCCL uses, and the free space of the current folder."""
    shared_memory = Path("/dev/shm")
    if shared_memory.is_dir():
        size = shutil.disk_usage(shared_memory).total / _GIB
        yield Check(
            name="/dev/shm",
            state="ok" if size >= 1 else "warn",
            found=f"{size:.1f} GiB",
            advice="" if size >= 1 else "GPUs exchange gradients through it: docker run --shm-size 8g",
        )
    free = shutil.disk_usage(Path.cwd()).free / _GIB
    yield Check(
        name="disk",
        state="ok" if free >= 5 else "warn" if free >= 0.5 else "fail",
        found=f"{free:.1f} GiB free here",
        advice="" if free >= 5 else "make room: shards, checkpoints and wandb's files need some GiB",
    )


def _processes() -> Iterator[Check]:
    """All-reduce between two processes of this machine over gloo, within a minute."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    deadline = time.monotonic() + _GLOO_TIMEOUT
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = str(Path(folder) / "rendezvous")
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", _GLOO_PROCESS, rendezvous, str(rank), str(_GLOO_TIMEOUT / 2)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in (0, 1)
        ]
        try:
            outputs = [each.communicate(timeout=max(0.1, deadline - time.monotonic())) for each in processes]
            failure = next((stderr for stdout, stderr in outputs if stdout.strip() != "3"), None)
        except subprocess.TimeoutExpired:
            failure = f"no answer within {_GLOO_TIMEOUT:.0f} s"
        finally:
            for each in processes:
                each.kill()
                each.communicate()
    last_line = failure.strip().splitlines()[-1] if failure and failure.strip() else "no sum"
    yield Check(
        name="gloo",
        state="ok" if failure is None else "fail",
        found="two processes found each other" if failure is None else last_line,
        advice="" if failure is None else "name a network interface that works: export GLOO_SOCKET_IFNAME=lo",
    )


def _launch() -> Iterator[Check]:
    """Look for accelerate of this environment on PATH, and for a WORLD_SIZE that another launch left in the shell."""
    command = shutil.which("accelerate")
    scripts = Path(sys.executable).parent
    if command is None:
        state, found = "warn", "not on PATH"
    elif Path(command).parent.resolve() != scripts.resolve():
        state, found = "warn", f"{command} is of another environment"
    else:
        state, found = "ok", command
    yield Check(
        name="accelerate launch",
        state=state,
        found=found,
        advice="" if state == "ok" else f"activate the environment: export PATH={scripts}:$PATH",
    )
    size = os.environ.get("WORLD_SIZE", "1")
    if "TORCHELASTIC_RUN_ID" in os.environ and size != "1":
        yield Check(
            name="WORLD_SIZE",
            state="warn",
            found=f"{size}: the doctor itself was started by a launcher",
            advice="it looks at one machine: isicdist doctor",
        )
    elif size not in ("", "1"):
        yield Check(
            name="WORLD_SIZE",
            state="fail",
            found=f"{size}, left over from another launch: a run would wait for processes that do not exist",
            advice="unset WORLD_SIZE RANK LOCAL_RANK MASTER_ADDR MASTER_PORT",
        )
    else:
        yield Check(name="WORLD_SIZE", state="ok", found="not set by a launcher, as it should be here")


def _environment() -> Iterator[Check]:
    """List the environment variables that launchers, accelerate and torch would read, and refuse as a run would."""
    from isicdist.distributed.environment import notable, read_environment

    found = ", ".join(f"{name}={value}" for name, value in notable(os.environ).items()) or "none that matters is set"
    try:
        read_environment(dict(os.environ))
    except UsageError as error:
        yield Check(name="environment", state="fail", found=found, advice=str(error))
    else:
        yield Check(name="environment", state="ok", found=found)


def _jpeg() -> Iterator[Check]:
    """Encode and decode a JPEG with simplejpeg."""
    import numpy as np
    import simplejpeg

    ramp = np.linspace(0, 255, 64, dtype=np.uint8)
    image = np.ascontiguousarray(np.broadcast_to(ramp[:, None, None], (64, 64, 3)))
    decoded = simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(image, quality=95))
    fits = decoded.shape == image.shape and int(np.abs(decoded.astype(int) - image).max()) <= 8
    yield Check(
        name="JPEG",
        state="ok" if fits else "fail",
        found="simplejpeg decodes what it encodes" if fits else "simplejpeg decodes to other pixels",
        advice="" if fits else "pip install --force-reinstall simplejpeg",
    )


def _wandb() -> Iterator[Check]:
    """Find the mode that wandb will run in."""
    from isicdist.training.tracking import resolve_wandb_mode

    mode, reason = resolve_wandb_mode()
    refused = os.environ.get("WANDB_MODE") == "online" and mode != "online"
    yield Check(
        name="wandb",
        state="warn" if refused else "ok",
        found=f"{mode} ({reason})",
        advice="wandb login, or unset WANDB_MODE" if refused else "",
    )
