"""Is this machine fit to train? Each check looks at one thing and says what to do about it.

Nothing here is guessed from a version number where it can be tried: two processes really find each other over
gloo, and a JPEG really is decoded.
"""

from __future__ import annotations

import importlib.metadata
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

State = Literal["ok", "warn", "fail"]

_GLOO_SECONDS = 60.0
_GIB = 2**30
_INSTALL = "pip install -c constraints.txt -e ."

# One of two processes: adds its rank + 1 to the other's and prints the sum.
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
    """What one look at the machine found."""

    name: str
    state: State
    """ok; warn: training works but not as well or not as meant; fail: it will not work."""
    found: str
    """What there is, in one line."""
    advice: str = ""
    """What to do, in one line; empty where nothing is."""


def run_doctor(console: Console | None = None) -> int:
    """Print every check as a table (on stdout, or on `console`); return 1 if any failed, else 0."""
    console = console or Console()
    with console.status("Looking at this machine, and starting two processes on it"):
        found = checks()
    table = Table("check", "")
    table.add_column("found", overflow="fold")
    table.add_column("what to do", overflow="fold")
    for check in found:
        style = {"ok": "green", "warn": "yellow", "fail": "bold red"}[check.state]
        table.add_row(check.name, f"[{style}]{check.state}[/]", escape(check.found), escape(check.advice))
    console.print(table)
    return 1 if any(check.state == "fail" for check in found) else 0


def checks() -> list[Check]:
    """Look at everything. A look that breaks is a failed check, not an error."""
    looks: list[tuple[str, Callable[[], Iterator[Check]]]] = [
        ("versions", _versions),
        ("devices", _devices),
        ("threads", _threads),
        ("memory and disk", _space),
        ("processes", _processes),
        ("launch", _launch),
        ("JPEG", _jpeg),
        ("wandb", _wandb),
    ]
    found: list[Check] = []
    for name, look in looks:
        try:
            found.extend(look())
        except Exception as error:  # whatever it is, the user has to see it beside the rest
            line = " ".join(f"{type(error).__name__}: {error}".split())
            found.append(Check(name=name, state="fail", found=line, advice=_INSTALL))
    return found


def _versions() -> Iterator[Check]:
    """Python and every dependency against the ranges that this installation was made with."""
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
    import torch
    from torch import distributed
    from torch.cuda import nccl

    from isicdist.distributed.launch import cpu_has_bf16

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        unused = torch.version.cuda is None and Path("/dev/nvidia0").exists()
        yield Check(
            name="GPUs",
            state="warn" if unused else "ok",
            found="a GPU, but this torch is built for the CPU" if unused else "none; training runs on the CPU",
            advice="install torch's CUDA build" if unused else "",
        )
        bf16 = cpu_has_bf16()
        found = "in this CPU" if bf16 else "not in this CPU: float32 takes its place"
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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = os.environ.get("OMP_NUM_THREADS", "")
    if not text:
        said, fits = "OMP_NUM_THREADS not set: the launcher decides", True
    else:
        fits = text.isdecimal() and 1 <= int(text) <= cores
        said = f"OMP_NUM_THREADS={text} for each process"
    yield Check(
        name="cores",
        state="ok" if fits else "warn",
        found=f"{cores}; {said}",
        advice="" if fits else "unset OMP_NUM_THREADS, or set it to cores / processes",
    )


def _space() -> Iterator[Check]:
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total / _GIB
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
    """Two processes of this machine add 1 and 2 over gloo, within a minute."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        both = [
            subprocess.Popen(
                [sys.executable, "-c", _GLOO_PROCESS, meeting, str(rank), str(_GLOO_SECONDS / 2)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in (0, 1)
        ]
        try:
            said = [process.communicate(timeout=_left(start)) for process in both]
            wrong = next((error for (out, error) in said if out.strip() != "3"), None)
        except subprocess.TimeoutExpired:
            wrong = f"no answer within {_GLOO_SECONDS:.0f} s"
        finally:
            for process in both:
                process.kill()
                process.communicate()
    last = wrong.strip().splitlines()[-1] if wrong and wrong.strip() else "no sum"
    yield Check(
        name="gloo",
        state="ok" if wrong is None else "fail",
        found="two processes found each other" if wrong is None else last,
        advice="" if wrong is None else "name a network interface that works: export GLOO_SOCKET_IFNAME=lo",
    )


def _left(start: float) -> float:
    return max(0.1, _GLOO_SECONDS - (time.monotonic() - start))


def _launch() -> Iterator[Check]:
    command = shutil.which("accelerate")
    beside = Path(sys.executable).parent
    if command is None:
        state, found = "warn", "not on PATH"
    elif Path(command).parent.resolve() != beside.resolve():
        state, found = "warn", f"{command} is of another environment"
    else:
        state, found = "ok", command
    yield Check(
        name="accelerate launch",
        state=state,
        found=found,
        advice="" if state == "ok" else f"activate the environment: export PATH={beside}:$PATH",
    )
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        yield Check(name="WORLD_SIZE", state="ok", found="not set by a launcher, as it should be here")
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        yield Check(
            name="WORLD_SIZE",
            state="warn",
            found=f"{size}: the doctor itself was started by a launcher",
            advice="it looks at one machine: isicdist doctor",
        )
    else:
        yield Check(
            name="WORLD_SIZE",
            state="fail",
            found=f"{size}, left over from another launch: a run would wait for processes that don't exist",
            advice="unset WORLD_SIZE RANK LOCAL_RANK MASTER_ADDR MASTER_PORT",
        )


def _jpeg() -> Iterator[Check]:
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
    from isicdist.training.tracking import resolve_wandb_mode

    mode, why = resolve_wandb_mode()
    refused = os.environ.get("WANDB_MODE") == "online" and mode != "online"
    yield Check(
        name="wandb",
        state="warn" if refused else "ok",
        found=f"{mode} ({why})",
        advice="wandb login, or unset WANDB_MODE" if refused else "",
    )
