"""Throughput of the bare step: that of `isicdist train`, on one batch that is on the device already.

    python -m benchmarks.gpu.bare --sets FOLDER --names "bare step, 64 x 128, bf16" ...

A `Trainer` makes the step, so nothing here repeats what it does: augmentation, forward, loss, backward, clipping, fused
Adam, moving average and counts. Many steps are timed in a row without a wait between them, so the host may run ahead of
the device. The difference to a run's throughput is what reading, decoding, upload and the log cost.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import statistics
import tempfile
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch

from benchmarks.gpu.rows import Outcome, emit_rows
from benchmarks.train_step import channels_last, plain_dropout
from isicdist.config import AugmentConfig, BatchConfig, ModelConfig, Precision, TrainConfig
from isicdist.data import augment as augmentation
from isicdist.data.stream import Batch, Step
from isicdist.distributed.gradients import Gradients
from isicdist.network.unet import ImprovedUNet
from isicdist.settings_file import load_recipe
from isicdist.train import Trainer

ROUNDS = 3
LAUNCHES = 10
"""Steps whose launching is timed."""
TRANSFORM = augmentation.transform


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row: a batch and a side, and what differs from how a run trains."""

    batch: int
    side: int
    """Of the images, in pixels."""
    precision: Precision = "bf16"
    tf32: bool = True
    dropout: Literal["keyed", "torch", "none"] = "keyed"
    augment: bool = True
    layout: Literal["default", "channels last"] = "default"
    compile: Literal["no", "yes", "few buffers", "augmentation", "CUDA graphs"] = "no"
    """few buffers: have inductor compute again what it would keep in float32 between two kernels; augmentation: compile
    that, too."""
    cudnn_benchmark: bool = False

    @property
    def name(self) -> str:
        """Name of the row: batch, side, precision, and what differs."""
        precision = "float32" if self.precision == "no" else self.precision
        changes = [precision + ("" if self.precision != "no" or self.tf32 else " without TF32")]
        changes += [] if self.dropout == "keyed" else [f"{self.dropout} dropout"]
        changes += [] if self.augment else ["no augmentation"]
        changes += [] if self.layout == "default" else [self.layout]
        changes += {"no": [], "yes": ["compiled"]}.get(self.compile, [f"compiled, {self.compile}"])
        changes += ["cudnn.benchmark"] if self.cudnn_benchmark else []
        return f"bare step, {self.batch} x {self.side}, {', '.join(changes)}"


BASE = Variant(batch=64, side=256)
COMPILED = dataclasses.replace(BASE, compile="yes")
FLOAT32 = dataclasses.replace(BASE, precision="no")
CHANNELS_LAST = dataclasses.replace(COMPILED, layout="channels last")
FIRST = [
    BASE,
    COMPILED,
    CHANNELS_LAST,
    dataclasses.replace(COMPILED, compile="few buffers"),
    dataclasses.replace(COMPILED, compile="augmentation"),
    dataclasses.replace(CHANNELS_LAST, compile="augmentation"),
    dataclasses.replace(CHANNELS_LAST, cudnn_benchmark=True),
    dataclasses.replace(BASE, compile="CUDA graphs"),
    FLOAT32,
]
"""The variants that the targets are about, and those that may become the default."""
_OTHER_SHAPES = ((8, 128), (64, 128), (16, 256), (128, 256), (32, 512))
OTHERS = [
    dataclasses.replace(BASE, dropout="none"),
    dataclasses.replace(BASE, precision="fp16"),
    dataclasses.replace(FLOAT32, tf32=False),
    dataclasses.replace(CHANNELS_LAST, compile="few buffers"),
    *(Variant(batch=batch, side=side) for batch, side in _OTHER_SHAPES),
    dataclasses.replace(BASE, cudnn_benchmark=True),
    dataclasses.replace(BASE, dropout="torch"),
    dataclasses.replace(BASE, dropout="none", layout="channels last"),
    dataclasses.replace(BASE, augment=False),
    Variant(batch=8, side=128, dropout="none", compile="CUDA graphs"),
    dataclasses.replace(COMPILED, dropout="none"),
    Variant(batch=64, side=128, compile="yes"),
    Variant(batch=32, side=512, compile="yes"),
]
"""Further ones, the most informative and the quickest first: the time budget may end before they are all measured."""
SHORT = [Variant(batch=4, side=48, precision="no")]
"""The one that is measured on a CPU."""


class BareStep:
    """The optimizer step of a run, again and again on its first batch."""

    def __init__(self, config: TrainConfig, data: Path, run: Path, variant: Variant | None = None) -> None:
        """Set up a run in the folder `run` on the shard set `data`, and change it as `variant` says."""
        self.trainer = Trainer(config, str(data), run)
        if variant:
            self._change(variant)
        self._steps = self.trainer.stream.steps()
        self.step: Step = next(self._steps)
        self._batches = iter(self.step)
        self.batch: Batch = next(self._batches)

    def __call__(self) -> None:
        """Queue one step on the device."""
        self.trainer.forward_backward(self.batch)
        self.trainer.optimizer_step(self.step)

    def close(self) -> None:
        """End the decoding threads and free the device's memory."""
        self._batches.close()  # pyright: ignore[reportAttributeAccessIssue]
        self._steps.close()  # pyright: ignore[reportAttributeAccessIssue]
        self.trainer.stream.__exit__()
        del self.trainer, self.batch
        augmentation.transform = TRANSFORM
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _change(self, variant: Variant) -> None:
        trainer = self.trainer
        if variant.dropout == "torch":
            plain_dropout(trainer.model)
        if variant.layout == "channels last":
            for network in (trainer.model, cast(ImprovedUNet, trainer.ema.model)):
                channels_last(network)
            trainer.gradients = Gradients(trainer.model.parameters(), trainer.accelerator)  # of the weights' layout
        if variant.compile == "CUDA graphs":
            trainer.prepared_model.compile(mode="reduce-overhead", dynamic=False)
        if variant.compile == "few buffers":
            options = {"realize_reads_threshold": 8, "realize_opcount_threshold": 100}
            trainer.prepared_model.compile(dynamic=False, options=options)
        if variant.compile == "augmentation":
            augmentation.transform = torch.compile(TRANSFORM, dynamic=False)


@contextlib.contextmanager
def started(variant: Variant, sets: Path) -> Generator[BareStep]:
    """Set up the step of a variant for the length of the context."""
    torch.backends.cudnn.benchmark = variant.cudnn_benchmark
    torch.backends.cudnn.allow_tf32 = variant.tf32
    config = TrainConfig(
        batch=BatchConfig(global_size=variant.batch),
        model=ModelConfig(dropout=0.0 if variant.dropout == "none" else 0.3),
        augment=AugmentConfig(
            **load_recipe("isic2018-128")["augment"] | {"enabled": variant.augment, "progressive_resize_fraction": 0.0}
        ),
        compile="on" if variant.compile in ("yes", "augmentation") else "off",
        epochs=10**6,
    )
    with tempfile.TemporaryDirectory() as folder:
        step = BareStep(config, sets / f"set-{variant.side}", Path(folder) / "run", variant)
        try:
            yield step
        finally:
            step.close()


def measure(variant: Variant, sets: Path, *, seconds: float = 1.0) -> Outcome:
    """Time a variant: ROUNDS rounds of about `seconds` each."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    with started(variant, sets) as step:
        timed(step, 1)
        first = time.perf_counter() - start
        timed(step, 3)
        estimate = timed(step, 2) / 2
        steps = max(2, min(200, round(seconds / estimate)))
        step_s = statistics.median(timed(step, steps) / steps for _ in range(ROUNDS))
        host_s = statistics.median(launch_time(step) for _ in range(LAUNCHES))
    values = {
        "images_per_s": variant.batch / step_s,
        "step_ms": 1e3 * step_s,
        "host_ms": 1e3 * host_s,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
        "first_step_s": first,
    }
    detail = "{images_per_s:.0f} images/s, step {step_ms:.2f} ms, host {host_ms:.2f} ms, peak {peak_gib:.2f} GiB, "
    return Outcome(
        result="measured", detail=(detail + "first step {first_step_s:.1f} s").format(**values), values=values
    )


def timed(step: BareStep, steps: int) -> float:
    """Give the seconds of a number of steps, until the device has done the last one."""
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def launch_time(step: BareStep) -> float:
    """Give the seconds that the host needs to launch one step, the device's queue being empty."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=Path, required=True, help="folder of the shard sets set-128, set-256, ...")
    parser.add_argument("--names", nargs="+", required=True, help="variants, all of one precision")
    options = parser.parse_args()
    by_name = {variant.name: variant for variant in (*FIRST, *OTHERS, *SHORT)}
    emit_rows({name: functools.partial(measure, by_name[name], options.sets) for name in options.names})


if __name__ == "__main__":
    main()
