"""Check what lies between ranks: rendezvous, interface, all-reduce with its bandwidth, clocks."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import distributed

from isicdist.distributed.interface import VARIABLE, routed_interface
from isicdist.distributed.scaling_model import allreduce_bandwidth
from isicdist.doctor.check import Check

_PAIR_TIMEOUT = 60.0  # seconds, for both processes to start, import torch and answer
_PAIR_PROGRAM = "from isicdist.doctor.network import measure_pair; measure_pair()"
_FLOATS = 3_200_000  # as many as gradients of the default network
_SLOW_SECONDS = 0.5  # of a probe of a tenth of them: then the whole is not tried
_MAX_SKEW = 5.0


@dataclass(frozen=True, kw_only=True)
class Link:
    """Measured all-reduce."""

    world_size: int
    bytes: int
    """Of the buffer that was reduced."""
    seconds: float
    """Of its all-reduce, on the slowest rank."""
    bandwidth_bytes_per_s: float
    """Of one link, in one direction."""
    latency_s: float
    """Of one message."""


def measure_link(device: torch.device) -> Link:
    """Time all-reduces of the default process group on `device`; every rank calls it and gets the same."""
    world_size = distributed.get_world_size()
    latency = _slowest(1, 5, device) / (2 * (world_size - 1))
    floats = _FLOATS // 10
    seconds = _slowest(floats, 1, device)
    if seconds < _SLOW_SECONDS:
        floats = _FLOATS
        seconds = _slowest(floats, 3, device)
    latency = min(latency, seconds / (4 * (world_size - 1)))  # at most half of the time, so that some is transfer
    return Link(
        world_size=world_size,
        bytes=4 * floats,
        seconds=seconds,
        bandwidth_bytes_per_s=allreduce_bandwidth(4 * floats, world_size, seconds, latency),
        latency_s=latency,
    )


def _slowest(floats: int, repeats: int, device: torch.device) -> float:
    """Time the fastest of some all-reduces, in seconds on the slowest rank."""
    values = torch.zeros(floats, device=device)
    fastest = float("inf")
    for _ in range(1 + repeats):
        start = time.perf_counter()
        distributed.all_reduce(values)
        values[0].item()  # waits for the device
        fastest = min(fastest, time.perf_counter() - start)
    seconds = torch.tensor([fastest], dtype=torch.float32, device=device)
    distributed.all_reduce(seconds, op=distributed.ReduceOp.MAX)
    return seconds.item()


def measure_pair() -> None:
    """Be one of two processes of this machine that measure their link over gloo; its JSON goes to stdout.

    Arguments of the process: a file for the rendezvous, its rank, a timeout in seconds.
    """
    file, rank, timeout = sys.argv[1:]
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{file}",
        rank=int(rank),
        world_size=2,
        timeout=timedelta(seconds=float(timeout)),
    )
    print(json.dumps(asdict(measure_link(torch.device("cpu")))))
    distributed.destroy_process_group()


def link_of_two_processes() -> Link:
    """Start two processes that all-reduce over gloo. Raises RuntimeError, with their last line, where they fail."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    deadline = time.monotonic() + _PAIR_TIMEOUT
    with tempfile.TemporaryDirectory() as folder:
        arguments = [sys.executable, "-c", _PAIR_PROGRAM, str(Path(folder) / "rendezvous")]
        processes = [
            subprocess.Popen(
                [*arguments, str(rank), str(_PAIR_TIMEOUT / 2)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in (0, 1)
        ]
        try:
            outputs = [each.communicate(timeout=max(0.1, deadline - time.monotonic())) for each in processes]
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"no answer within {_PAIR_TIMEOUT:.0f} s") from error
        finally:
            for each in processes:
                each.kill()
                each.communicate()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(errors.strip().splitlines()[-1] if errors.strip() else f"exit code {process.returncode}")
    return Link(**json.loads(outputs[0][0]))


def check_link(accelerator: Accelerator | None) -> Iterator[Check]:
    """Measure the all-reduce between all ranks, or between two processes of this machine without a launcher."""
    try:
        link = measure_link(accelerator.device) if accelerator else link_of_two_processes()
    except RuntimeError as error:
        line = " ".join(str(error).split())
        advice = "name a network interface that works: export GLOO_SOCKET_IFNAME=lo"
        yield Check(name="all-reduce", state="fail", found=line, advice=advice)
        return
    who = f"{link.world_size} ranks" if accelerator else "two processes of this machine"
    yield Check(
        name="all-reduce",
        state="ok",
        found=f"{link.bytes / 1e6:.1f} MB between {who} in {link.seconds * 1e3:.1f} ms: "
        f"{link.bandwidth_bytes_per_s / 1e9:.2f} GB/s, {link.latency_s * 1e6:.0f} µs a message",
        numbers={
            "bytes": link.bytes,
            "seconds": link.seconds,
            "bandwidth_bytes_per_s": link.bandwidth_bytes_per_s,
            "latency_s": link.latency_s,
        },
    )


def check_rendezvous(accelerator: Accelerator) -> Iterator[Check]:
    """Describe the process group that has formed: ranks, machines, address, backend. Every rank calls it."""
    hosts = len(set(gather_object([platform.node()])))
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    backend = distributed.get_backend()
    ranks = f"{accelerator.num_processes} ranks on {hosts} machine{'s' if hosts > 1 else ''}"
    yield Check(name="rendezvous", state="ok", found=f"{ranks} at {address}, {backend}")


def check_interface() -> Iterator[Check]:
    """Name the interfaces that gloo and NCCL use between machines."""
    gloo = os.environ.get(VARIABLE) or routed_interface(os.environ.get("MASTER_ADDR", "localhost"))
    nccl = os.environ.get("NCCL_SOCKET_IFNAME") or nccl_interface([name for _, name in socket.if_nameindex()])
    found = f"gloo: {gloo or 'that of the host name'}; NCCL, where it uses sockets: {nccl or 'none'}"
    try:
        own = socket.gethostbyname(platform.node())
    except OSError:
        own = "no address"
    found += f"; {platform.node()} resolves to {own}"
    yield Check(name="interface", state="ok", found=found)


def nccl_interface(names: list[str]) -> str | None:
    """Choose an interface as NCCL does by default: ib*, then any but docker* and lo, then those two."""
    groups = ("ib", "", "docker", "lo")
    for group in groups:
        for name in names:
            if name.startswith(group) and (group or not name.startswith(("docker", "lo"))):
                return name
    return None


def check_clocks(accelerator: Accelerator) -> Iterator[Check]:
    """Compare the clocks of all ranks, each read as soon as a barrier lets it go. Every rank calls it."""
    accelerator.wait_for_everyone()
    clocks: list[float] = gather_object([time.time()])
    skew = max(clocks) - min(clocks)
    yield Check(
        name="clocks",
        state="ok" if skew <= _MAX_SKEW else "warn",
        found=f"{skew * 1e3:.0f} ms apart",
        advice="" if skew <= _MAX_SKEW else "set the machines' clocks (NTP): object stores refuse requests by time",
        numbers={"skew_s": skew},
    )
