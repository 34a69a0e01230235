"""Scaling on paper: efficiency of 1 to 1,024 devices, by `isicdist.distributed.scaling_model`.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --images-per-s 3000 --step-overhead-ms 6 --min-step-ms 10 --gradient-mb 12.8

The defaults are those of the default network on one H200 at 256 x 256 in bf16, eager (results/2026-11-26-gpu.md): steps
of 64 and 128 images give 1,553 images/s and 5.7 ms beside, and a step of 16 is bound by the host, which takes 18.4 ms.
`isicdist doctor --data DIR` measures them elsewhere.

Efficiency is the time of one device for the global batch, by micro batches of 64, over the devices' time together: 1
where twice the devices take half the time. The ring goes over one network card per machine of 8 devices on Ethernet,
and one per device on InfiniBand. NCCL's trees have fewer messages than a ring, so that where latencies count (beyond
256 devices) it is faster than this. `make test-cluster` compares the model with all-reduces and training steps of two
and three hosts over links slowed by `tc`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from isicdist.distributed.scaling_model import allreduce_seconds

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


def main() -> None:
    """Print the tables as Markdown."""
    parser = argparse.ArgumentParser(description="Scaling on paper.")
    parser.add_argument("--images-per-s", type=float, default=1553.0)
    parser.add_argument("--step-overhead-ms", type=float, default=5.7)
    parser.add_argument("--min-step-ms", type=float, default=18.4)
    parser.add_argument("--gradient-mb", type=float, default=12.8)
    given = parser.parse_args()
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
