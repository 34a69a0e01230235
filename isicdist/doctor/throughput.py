"""Check the speed of a run on a shard set: decoding, the bare step, what bounds a run, and the time of an epoch."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object

from isicdist.config import BatchConfig, StreamConfig, TrainConfig, precision_name
from isicdist.distributed.scaling_model import Rates, epoch_seconds, step_time, threads_to_feed
from isicdist.doctor.check import Check
from isicdist.train import Trainer
from shards.errors import ToolkitError
from shards.reader import Split

_SECONDS = 2.0  # of each measurement
_MAX_PASSES = 200
_CPU_MICRO_SIZE = 2  # a forward and backward pass of 512 pixels takes seconds
_GPU_MICRO_SIZE = 64  # a smaller one leaves a GPU idle while the host launches kernels
_DEVICES = (1, 8, 64)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Rates of one rank, or the line of the error that has kept it from measuring them."""

    compute_images_per_s: float = 0.0
    decode_images_per_s: float = 0.0
    error: str | None = None


def check_throughput(data: str, link: Mapping[str, float]) -> Iterator[Check]:
    """Measure decoding and the step of a run with default settings; predict an epoch. Every rank calls it.

    `link`: the numbers of `isicdist.doctor.network.check_link`.
    """
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    of_gpu = BatchConfig(global_size=_GPU_MICRO_SIZE * ranks)
    config = TrainConfig(
        batch=of_gpu if torch.cuda.is_available() else BatchConfig(micro_size=_CPU_MICRO_SIZE),
        stream=StreamConfig(decoded_cache="off"),
        compile="off",  # compiling takes a minute
    )
    with tempfile.TemporaryDirectory() as run:
        trainer = Trainer(config, data, Path(run))
    measured: list[Measured] = gather_object([_measure(trainer)])
    error = next((each.error for each in measured if each.error), None)
    if error:
        yield Check(name="data", state="fail", found=error, advice=f"isic-shards verify {data}")
        return
    rates = Rates(
        compute_images_per_s=min(each.compute_images_per_s for each in measured),
        decode_images_per_s=min(each.decode_images_per_s for each in measured),
        decode_threads=trainer.workers,
        gradient_bytes=4 * (1 + sum(weights.numel() for weights in trainer.model.parameters())),
        bandwidth_bytes_per_s=link["bandwidth_bytes_per_s"],
        latency_s=link["latency_s"],
    )
    side, world_size = trainer.train_split.size, trainer.accelerator.num_processes
    precision = precision_name(trainer.accelerator.mixed_precision)
    yield Check(
        name="decoding",
        state="ok",
        found=f"{rates.decode_images_per_s:.0f} images/s per thread at {side} x {side}",
        numbers={"images_per_s": rates.decode_images_per_s},
    )
    yield Check(
        name="step",
        state="ok",
        found=f"{rates.compute_images_per_s:.1f} images/s per device, forward and backward, {precision}, "
        f"micro batch {trainer.stream.plan.micro_size}",
        numbers={"images_per_s": rates.compute_images_per_s},
    )
    yield from forecast(rates, len(trainer.train_split), BatchConfig().global_size, world_size)


def forecast(rates: Rates, samples: int, global_size: int, world_size: int) -> Iterator[Check]:
    """Name what bounds a step on `world_size` devices, the threads that feed one, and predict the time of an epoch."""
    step, threads = step_time(rates, global_size, world_size), threads_to_feed(rates)
    advice = {
        "compute": "",
        "data": f"--stream.workers {threads} and as many cores per rank; from the second epoch on samples are cached",
        "network": "a larger --batch.global-size, fewer devices, or a faster network",
    }[step.bound]
    parts = f"data {step.data * 1e3:.1f} ms, compute {step.compute * 1e3:.1f} ms, network {step.network * 1e3:.1f} ms"
    yield Check(
        name="bound",
        state="warn" if advice else "ok",
        found=f"{step.bound}: a step of {global_size} samples on {world_size} device(s) takes {parts}",
        advice=advice,
        numbers={"data_s": step.data, "compute_s": step.compute, "network_s": step.network},
    )
    yield Check(
        name="decoding threads",
        state="ok" if threads <= rates.decode_threads else "warn",
        found=f"{rates.decode_threads} per rank; {threads} feed a device",
        advice="" if threads <= rates.decode_threads else f"--stream.workers {threads}",
        numbers={"needed": threads},
    )
    epochs = {devices: epoch_seconds(rates, samples, global_size, devices) for devices in _DEVICES}
    yield Check(
        name="epoch",
        state="ok",
        found=f"of {samples} samples, over the link measured here: "
        + ", ".join(f"{seconds:.3g} s on {devices}" for devices, seconds in epochs.items()),
        numbers={f"on_{devices}_s": seconds for devices, seconds in epochs.items()},
    )


def _measure(trainer: Trainer) -> Measured:
    """Measure on this rank alone; no collective, so that ranks may differ in the number of repeats."""
    try:
        return Measured(
            compute_images_per_s=_compute_rate(trainer), decode_images_per_s=_decode_rate(trainer.train_split)
        )
    except (ToolkitError, OSError) as error:
        return Measured(error=str(error))


def _decode_rate(split: Split) -> float:
    """Read and decode samples on this thread; returns images/s."""
    side = split.size
    assert side is not None
    image, mask = np.empty((side, side, 3), np.uint8), np.empty((side, side), np.uint8)
    split.sample(0, image, mask)  # opens the shard
    indices = np.linspace(0, len(split) - 1, 1000, dtype=int)
    start, images = time.perf_counter(), 0
    for index in indices:
        split.sample(int(index), image, mask)
        images += 1
        if time.perf_counter() - start > _SECONDS:
            break
    return images / (time.perf_counter() - start)


def _compute_rate(trainer: Trainer) -> float:
    """Repeat forward and backward passes on one batch, halved while it does not fit in memory; returns images/s."""
    with trainer.stream:
        position = trainer.stream.state_dict()
        while True:
            with trainer.oom_guard:
                return _time_passes(trainer)
            trainer.gradients.zero()
            trainer.stream.plan = trainer.oom_guard.halve_micro_batch(trainer.stream.plan, "auto")
            trainer.stream.load_state_dict(position)


def _time_passes(trainer: Trainer) -> float:
    steps = trainer.stream.steps()
    batches = iter(next(steps))
    batch = next(batches)

    def seconds(passes: int) -> float:
        """Time passes in a row: a GPU works on one while the host launches the next."""
        start = time.perf_counter()
        for _ in range(passes):
            trainer.forward_backward(batch)
            trainer.gradients.zero()
        _synchronize(trainer.accelerator.device)
        return time.perf_counter() - start

    try:
        seconds(1)  # warms up
        passes = max(1, min(_MAX_PASSES, round(_SECONDS / seconds(1))))
        return passes * len(batch.images) / seconds(passes)
    finally:
        batches.close()  # pyright: ignore[reportAttributeAccessIssue]
        steps.close()  # pyright: ignore[reportAttributeAccessIssue]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
