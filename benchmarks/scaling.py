"""Scaling by `isicdist.distributed.scaling_model`: on paper from 1 to 1,024 devices, and measured on 1 and 2 processes.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --images-per-s 3000 --step-overhead-ms 6 --min-step-ms 10 --gradient-mb 12.8
    python benchmarks/scaling.py --data SET

The defaults are those of the default network on one H200 at 256 x 256 in bf16, eager (results/2026-11-26-gpu.md): steps
of 64 and 128 images give 1,553 images/s and 5.7 ms beside, and a step of 16 is bound by the host, which takes 18.4 ms.
`isicdist doctor --data DIR` measures them elsewhere.

Efficiency is the time of one device for the global batch, by micro batches of 64, over the devices' time together: 1
where twice the devices take half the time. The ring goes over one network card per machine of 8 devices on Ethernet,
and one per device on InfiniBand. NCCL's trees have fewer messages than a ring, so that where latencies count (beyond
256 devices) it is faster than this. `make test-cluster` compares the model with all-reduces and training steps of two
and three hosts over links slowed by `tc`.

With a shard set of one size the model is compared with this machine instead, on its CPU: `isicdist doctor` measures
the rates of one process of one thread, and of the link between two; `isicdist train` the steps on 1 and 2 processes,
each of which has --batch images. They take turns; ratios are taken within a round, medians are over the rounds. The
rates of one process are measured while the other cores are idle, so that the ratio on 2 processes also holds what two
processes cost each other in memory and clock. 8 and 64 processes are predicted over the same link.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from isicdist.distributed.scaling_model import Rates, allreduce_seconds, step_time

ROOT = Path(__file__).resolve().parent.parent
MEASURED, PREDICTED = (1, 2), (8, 64)
DECODING_THREADS = 2
NEVER = 10**6

DEVICES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
GLOBAL_SIZES = (64, 256, 1024, 4096)
MICRO_SIZE = 64
PER_MACHINE = 8
WORTH_CHANGING = 0.05
"""Share of a step from which on the all-reduce is worth doing something about."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """Link between machines, and within them up to PER_MACHINE devices."""

    name: str
    bandwidth_bytes_per_s: float
    """In one direction."""
    latency_s: float
    """Of one message."""


NVLINK = Link(name="NVLink", bandwidth_bytes_per_s=450e9, latency_s=3e-6)
LINKS = (
    NVLINK,
    Link(name="InfiniBand NDR", bandwidth_bytes_per_s=50e9, latency_s=5e-6),
    Link(name="100 GbE", bandwidth_bytes_per_s=12.5e9, latency_s=30e-6),
    Link(name="25 GbE", bandwidth_bytes_per_s=3.125e9, latency_s=30e-6),
)


@dataclass(frozen=True, kw_only=True)
class Device:
    """Speed of one device."""

    images_per_s: float
    step_overhead_s: float
    """Time of a micro batch beside its images."""
    min_step_s: float
    """Time that the host takes to launch the kernels of a micro batch."""

    def seconds(self, images: int) -> float:
        """Time of the forward and backward passes of `images`, in micro batches of MICRO_SIZE."""
        whole, rest = divmod(images, MICRO_SIZE)
        return whole * self._micro_batch(MICRO_SIZE) + (self._micro_batch(rest) if rest else 0.0)

    def _micro_batch(self, images: int) -> float:
        return max(self.min_step_s, self.step_overhead_s + images / self.images_per_s)


def network_seconds(link: Link, gradient_bytes: int, devices: int) -> float:
    """Time of the all-reduce: inside one machine over NVLink, else over `link`, the slowest of the ring."""
    slowest = NVLINK if devices <= PER_MACHINE else link
    return allreduce_seconds(gradient_bytes, devices, slowest.bandwidth_bytes_per_s, slowest.latency_s)


def efficiency(device: Device, link: Link, gradient_bytes: int, global_size: int, devices: int) -> float:
    """Speed-up over one device, divided by the number of devices; in (0, 1]."""
    share = -(-global_size // devices)
    step = device.seconds(share) + network_seconds(link, gradient_bytes, devices)
    return device.seconds(global_size) / devices / step


def advice(device: Device, link: Link, gradient_bytes: int, devices: int) -> str:
    """Name the smallest global batch whose all-reduce takes at most WORTH_CHANGING of a step."""
    network = network_seconds(link, gradient_bytes, devices)
    share = 1
    while network > WORTH_CHANGING * (device.seconds(share) + network):
        share *= 2
    return (
        f"{devices} devices: {network * 1e3:.1f} ms, at most 5 % of a step from a global batch of {share * devices} on"
    )


def launch(processes: int, *words: object) -> str:
    """Run isicdist on CPU processes of one thread each; returns what it prints on stdout."""
    several = ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else []
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", *several]
    command += ["--num_processes", str(processes), "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["-m", "isicdist", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    environment |= {"ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout


def rates_of(checks: list[dict[str, Any]], gradient_bytes: int) -> Rates:
    """Take the rates of one process from the checks of `isicdist doctor --json --data SET`."""
    numbers: dict[str, Mapping[str, float]] = {check["name"]: check.get("numbers", {}) for check in checks}
    return Rates(
        compute_images_per_s=numbers["step"]["images_per_s"],
        decode_images_per_s=numbers["decoding"]["images_per_s"],
        decode_threads=DECODING_THREADS,
        gradient_bytes=gradient_bytes,
        bandwidth_bytes_per_s=numbers["all-reduce"]["bandwidth_bytes_per_s"],
        latency_s=numbers["all-reduce"]["latency_s"],
    )


def measure_rates(data: Path, gradient_bytes: int) -> Rates:
    """Measure one process, and the link between two."""
    printed = launch(1, "doctor", "--json", "--data", data)
    return rates_of(json.loads(printed)["checks"], gradient_bytes)


def measure_step(data: Path, processes: int, batch: int, steps: int) -> float:
    """Train `steps` steps after as many to warm up; returns seconds of one step. `batch`: images of one process."""
    with tempfile.TemporaryDirectory() as folder:
        run, settings = Path(folder) / "run", Path(folder) / "defaults.toml"
        settings.touch()  # the defaults, as the doctor measures them, and no recipe
        words = ["train", "--config", settings, "--data", data, "--run", run, "--tracker", "none"]
        words += ["--steps", 2 * steps, "--log-every", steps, "--eval-every", NEVER, "--checkpoint-every", NEVER]
        words += ["--epochs", NEVER, "--batch.global-size", batch * processes, "--batch.micro-size", 2]
        launch(processes, *words, "--stream.workers", DECODING_THREADS, "--stream.decoded-cache", "off")
        events = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        rates = [event["images_per_s"] for event in events if event["event"] == "train"]
    return batch * processes / rates[-1]


@dataclass(frozen=True, kw_only=True)
class Round:
    """Rates and steps that were measured in turn."""

    rates: Rates
    seconds: Mapping[int, float]
    """Of a step, by the number of processes."""
    other_cores: float
    """Cores that other work of this machine took meanwhile, on average; where it is not near 0 the steps of all cores
    wait for it."""

    def predicted(self, processes: int, batch: int) -> float:
        """Seconds of a step by the model; `batch`: images of one process."""
        return step_time(self.rates, batch * processes, processes).total


def print_measured(rounds: list[Round], batch: int) -> None:
    """Print predicted and measured steps as Markdown; efficiency is the step of one process over that of several."""
    print("| processes | global batch | measured, s | by the model, s | ratio | efficiency measured | by the model |")
    print("|---" * 7 + "|")
    for count in (*MEASURED, *PREDICTED):
        predicted = [each.predicted(count, batch) for each in rounds]
        efficiency = statistics.median(each.predicted(1, batch) / each.predicted(count, batch) for each in rounds)
        cells = ["-", f"{statistics.median(predicted):.3f}", "-", "-", f"{efficiency:.3f}"]
        if count in MEASURED:
            measured = [each.seconds[count] for each in rounds]
            ratios = [seconds / model for seconds, model in zip(measured, predicted, strict=True)]
            cells[0] = f"{statistics.median(measured):.3f}"
            cells[2] = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            cells[3] = f"{statistics.median(each.seconds[1] / each.seconds[count] for each in rounds):.3f}"
        print(f"| {count} | {batch * count} | " + " | ".join(cells) + " |")


def cpu_seconds() -> tuple[float, float]:
    """CPU seconds of the machine so far, and of this process and its children that have ended."""
    machine = psutil.cpu_times()
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return machine.user + machine.system, sum(usage.ru_utime + usage.ru_stime for usage in own)


def measure_round(data: Path, batch: int, steps: int, gradient_bytes: int) -> Round:
    """Measure the rates, and then the steps."""
    start, (machine, own) = time.perf_counter(), cpu_seconds()
    rates = measure_rates(data, gradient_bytes)
    seconds = {count: measure_step(data, count, batch, steps) for count in MEASURED}
    now_machine, now_own = cpu_seconds()
    other_cores = (now_machine - machine - now_own + own) / (time.perf_counter() - start)
    return Round(rates=rates, seconds=seconds, other_cores=max(0.0, other_cores))


def compare(data: Path, batch: int, steps: int, rounds: int, gradient_bytes: int) -> None:
    """Measure in turn, and print the table and how it was measured."""
    measured = [measure_round(data, batch, steps, gradient_bytes) for _ in range(rounds)]
    print_measured(measured, batch)
    rates, other_cores = measured[-1].rates, sorted(each.other_cores for each in measured)
    print(
        f"\n{date.today()}: {batch} images per process and step in micro batches of 2, float32, {steps} steps, medians "
        f"(lowest to highest) of {rounds} rounds; the last round's rates: step {rates.compute_images_per_s:.1f} and "
        f"decoding {rates.decode_images_per_s:.0f} images/s, link {rates.bandwidth_bytes_per_s / 1e9:.2f} GB/s and "
        f"{rates.latency_s * 1e6:.0f} µs a message; {platform.machine()}, {os.cpu_count()} cores, torch "
        f"{version('torch')}; other work took {other_cores[0]:.1f} to {other_cores[-1]:.1f} cores"
    )


def main() -> None:
    """Print the tables as Markdown."""
    parser = argparse.ArgumentParser(description="Scaling on paper, or with --data measured on this machine.")
    parser.add_argument("--data", type=Path, help="measure on this shard set")
    parser.add_argument("--batch", type=int, default=8, help="images of one process, with --data")
    parser.add_argument("--steps", type=int, default=8, help="measured in each run, with --data")
    parser.add_argument("--rounds", type=int, default=3, help="with --data")
    parser.add_argument("--images-per-s", type=float, default=1553.0)
    parser.add_argument("--step-overhead-ms", type=float, default=5.7)
    parser.add_argument("--min-step-ms", type=float, default=18.4)
    parser.add_argument("--gradient-mb", type=float, default=12.8)
    given = parser.parse_args()
    if given.data:
        compare(given.data, given.batch, given.steps, given.rounds, int(given.gradient_mb * 1e6))
        return
    device = Device(
        images_per_s=given.images_per_s,
        step_overhead_s=given.step_overhead_ms / 1e3,
        min_step_s=given.min_step_ms / 1e3,
    )
    gradient_bytes = int(given.gradient_mb * 1e6)
    for link in LINKS:
        most = PER_MACHINE if link is NVLINK else DEVICES[-1]
        devices = [count for count in DEVICES if count <= most]
        print(f"\n**{link.name}**, {link.bandwidth_bytes_per_s / 1e9:g} GB/s, {link.latency_s * 1e6:g} µs a message\n")
        print("| global batch | " + " | ".join(map(str, devices)) + " |\n|---|" + "---|" * len(devices))
        for size in GLOBAL_SIZES:
            cells = [
                f"{efficiency(device, link, gradient_bytes, size, count):.2f}" if count <= size else "-"
                for count in devices
            ]
            print(f"| {size} | " + " | ".join(cells) + " |")
        if link is not NVLINK:
            lines = [advice(device, link, gradient_bytes, count) for count in (16, 64, 256, 1024)]
            print("\nAll-reduce, and how far to accumulate or enlarge the batch: " + "; ".join(lines) + ".")


if __name__ == "__main__":
    main()
