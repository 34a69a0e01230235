"""Precision on a CPU: measure once per machine whether bf16 or float32 trains faster, and cache the answer.

Instructions for bf16 do not make it faster: an Intel Xeon with avx512_bf16 ran the training step 1.15 to 1.45 times as
fast in float32. Without them torch does not even hand the convolutions to oneDNN: a step took 11 times as long.
"""

from __future__ import annotations

import contextlib
import json
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from isicdist.config import Precision
from isicdist.network.loss import segmentation_loss
from isicdist.network.unet import ImprovedUNet
from shards.files import write_file
from shards.remote.cache_folder import cache_root

MIN_GAIN = 1.1
"""Ratio of the times in float32 and bf16 from which on bf16 is used: below it, precision is worth more."""
_SIDE, _BATCH, _REPEATS = 64, 2, 3


@dataclass(frozen=True, kw_only=True)
class CpuPrecision:
    """Result of the measurement on one machine."""

    precision: Precision
    """The one to compute in: bf16 or no (float32)."""
    gain: float
    """Time of a training step in float32 divided by that in bf16; 0 where bf16 was not tried."""


def faster_cpu_precision() -> Precision:
    """Give the precision that this CPU trains faster in."""
    return probe_cpu_precision().precision


def probe_cpu_precision() -> CpuPrecision:
    """Measure a training step in float32 and in bf16, in about a second, or read what was measured here before."""
    if not _has_bf16_instructions():
        return CpuPrecision(precision="no", gain=0.0)
    path, key = cache_root() / "cpu-precision.json", _machine()
    cached = _read(path)
    if key not in cached:
        gain = _step_seconds(bf16=False) / _step_seconds(bf16=True)
        cached[key] = CpuPrecision(precision="bf16" if gain >= MIN_GAIN else "no", gain=round(gain, 3))
        _write(path, cached)
    return cached[key]


def _has_bf16_instructions() -> bool:
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _step_seconds(*, bf16: bool) -> float:
    """Time the fastest of a few forward and backward passes of the network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ImprovedUNet(dropout=0.0)
        images = torch.rand(_BATCH, 3, _SIDE, _SIDE)
    masks = (images[:, :1] > 0.5).to(torch.uint8)
    seconds: list[float] = []
    for _ in range(1 + _REPEATS):  # the first one warms up
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(images)
        segmentation_loss(logits.float(), masks).sum().backward()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _machine() -> str:
    """Name what the result depends on: processor, torch, threads."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    return f"{platform.node()} / {processor} / torch {torch.__version__} / {torch.get_num_threads()} threads"


def _read(path: Path) -> dict[str, CpuPrecision]:
    try:
        return {key: CpuPrecision(**value) for key, value in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):  # no cache yet, or none that can be used
        return {}


def _write(path: Path, cached: dict[str, CpuPrecision]) -> None:
    with contextlib.suppress(OSError):  # where nothing can be cached, it is measured at each start
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps({key: asdict(value) for key, value in cached.items()}, indent=1).encode())
