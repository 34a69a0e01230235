"""Rows about throughput: building sets, the loop against the bare step, epochs, evaluation, prediction, the targets."""

from __future__ import annotations

import math
import statistics
import sys
import time
import zipfile
from pathlib import Path

from benchmarks.gpu import bare
from benchmarks.gpu.kit import ONE_STEP, Kit
from benchmarks.gpu.rows import Outcome
from isicdist.run_folder import METRICS_NAME
from isicdist.training.tracking.metrics_file import read_metrics
from shards.reader import ShardSet

LOG_LINES = 6
"""Log lines of a throughput run; the first third is left out as warm-up."""
WARM_LINES = 2
SAMPLE_IMAGES = 64
"""Images of the smaller one of two predictions, whose difference is free of the start-up time."""


def build(kit: Kit, side: int) -> Outcome:
    """Build the shard set of one side."""
    words = [sys.executable, "-m", "shards", "build", "--images", kit.images, "--masks", kit.masks]
    start = time.perf_counter()
    kit.run(*words, "--size", str(side), "--out", str(kit.shard_set(side)), seconds=120)
    seconds = time.perf_counter() - start
    shards = ShardSet.open(str(kit.shard_set(side)))
    samples = sum(len(shards.split(name)) for name in ("train", "val", "test"))
    rate = samples / seconds
    detail = f"{samples} pairs, {rate:.0f} pairs/s, start included"
    return Outcome(result="measured", detail=detail, values={"pairs_per_s": rate})


def loop(kit: Kit, name: str, **flags: object) -> Outcome:
    """Train as a user does, and compare the throughput with that of the bare step."""
    sizes, run = kit.sizes, kit.work / name.replace(", ", "-").replace(" ", "-")
    log_every = sizes.steps // LOG_LINES
    settings = {"steps": sizes.steps, "log_every": log_every, "augment__progressive_resize_fraction": 0}
    kit.worker(*kit.train_words(run.name, sizes.medium, model__dropout=0.3, **settings, **flags), seconds=150)
    lines, _ = read_metrics(run / METRICS_NAME)
    first, steady = lines[0], lines[WARM_LINES:]
    rate = statistics.median(line.images_per_s for line in steady)
    values = {"images_per_s": rate, "data_wait": statistics.median(line.data_wait for line in steady)}
    values["first_images_per_s"] = first.images_per_s
    detail = f"{rate:.0f} images/s, data_wait {100 * values['data_wait']:.1f} %, in the first {log_every} steps "
    detail += f"{first.images_per_s:.0f} images/s"
    variant = bare.COMPILED if flags.get("compile") == "on" else bare.BASE
    bare_rate = kit.report.value(variant.name, "images_per_s")
    if bare_rate:
        values["of_bare"] = rate / bare_rate
        detail += f"; {values['of_bare']:.3f} of the bare step"
    return Outcome(result="measured", detail=detail, values=values)


def epochs(kit: Kit, batch: int) -> Outcome:
    """Train three epochs of the recipe: what an epoch takes with its evaluation and its checkpoint."""
    run = kit.work / f"epochs-{batch}"
    flags = {"epochs": 3, "eval_every": 0, "checkpoint_every": 0, "log_every": 10, "batch__global_size": batch}
    words = kit.train_words(run.name, kit.sizes.small, augment__progressive_resize_fraction=0, **flags)
    command = [sys.executable, "-m", "benchmarks.gpu.worker", *words]
    lines = kit.lines(*command, seconds=120, env={"ACCELERATE_MIXED_PRECISION": kit.precision})
    evaluated = [time.perf_counter() for line in lines if "mean dice" in line]
    train, _ = read_metrics(run / METRICS_NAME)
    samples = len(ShardSet.open(str(kit.shard_set(kit.sizes.small))).split("train"))
    steps = math.ceil(samples / batch)
    epoch_s = (evaluated[-1] - evaluated[0]) / (len(evaluated) - 1)
    step_s = samples / statistics.median(line.images_per_s for line in train)
    values = {"epoch_s": epoch_s, "steps_s": step_s}
    detail = f"{epoch_s:.2f} s for an epoch of {steps} steps with evaluation and checkpoint; {step_s:.2f} s of steps"
    return Outcome(result="measured", detail=detail, values=values)


def one_step(kit: Kit) -> Outcome:
    """Train one step, for the rows that need a model."""
    kit.worker(*kit.train_words(ONE_STEP, kit.sizes.medium, steps=1))
    return Outcome(detail="a model for the rows about evaluation and prediction")


def evaluate(kit: Kit) -> Outcome:
    """Evaluate the test and the train split: the difference of both is free of the start-up time."""
    run, data = kit.work / ONE_STEP, kit.shard_set(kit.sizes.medium)
    shards, seconds = ShardSet.open(str(data)), {}
    for split in ("test", "train"):
        start = time.perf_counter()
        kit.worker("evaluate", "--data", str(data), "--checkpoint", str(run), "--split", split)
        seconds[split] = time.perf_counter() - start
    return _rate(*((len(shards.split(split)), seconds[split]) for split in ("test", "train")))


def predict(kit: Kit) -> Outcome:
    """Predict a few and all images: the difference of both is free of the start-up time."""
    run, few = kit.work / ONE_STEP, kit.work / "few.zip"
    numbers = [_first_images(kit.images, few, SAMPLE_IMAGES if kit.gpus else 4)]
    numbers.append(_first_images(kit.images, None, None))
    pairs = []
    for name, images, number in (("few", str(few), numbers[0]), ("all", kit.images, numbers[1])):
        start = time.perf_counter()
        kit.worker("predict", "--images", images, "--checkpoint", str(run), "--out", str(kit.work / f"masks-{name}"))
        pairs.append((number, time.perf_counter() - start))
    return _rate(*pairs)


def targets(kit: Kit) -> Outcome:
    """Compare with what one H100 should reach at 256 x 256 in bf16."""
    eager, compiled, float32 = (
        kit.report.value(variant.name, "images_per_s") for variant in (bare.BASE, bare.COMPILED, bare.FLOAT32)
    )
    of_bare = kit.report.value("loop", "of_bare")
    data_wait = kit.report.value("loop", "data_wait")
    met = {
        "loop at least 0.95 of the bare step": None if of_bare is None else of_bare >= 0.95,
        "compiled at least 3,000 images/s": None if compiled is None else compiled >= 3000,
        "bf16 compiled at least 4 times float32 eager": None if not (compiled and float32) else compiled / float32 >= 4,
        "data_wait below 1 %": None if data_wait is None else data_wait < 0.01,
    }
    words = {True: "met", False: "missed", None: "not measured"}
    detail = "; ".join(f"{name}: {words[value]}" for name, value in met.items())
    return Outcome(result="measured", detail=detail + (f"; eager {eager:.0f} images/s" if eager else ""))


def _rate(few: tuple[int, float], many: tuple[int, float]) -> Outcome:
    """Throughput from two commands, each (images, seconds)."""
    images, seconds = many[0] - few[0], many[1] - few[1]
    values = {"seconds": many[1]} | ({"images_per_s": images / seconds} if seconds > 0 else {})
    rate = f"{images / seconds:.0f} images/s; " if seconds > 0 else ""
    detail = f"{rate}{many[0]} images take {many[1]:.1f} s, start included"
    return Outcome(result="measured", detail=detail, values=values)


def _first_images(source: str, out: Path | None, number: int | None) -> int:
    """Copy the first images of a folder or archive into the archive `out`, if given; returns their number."""
    if source.endswith(".zip"):
        with zipfile.ZipFile(source) as archive:
            images = {name: archive.read(name) for name in sorted(archive.namelist()) if name.endswith(".jpg")}
    else:
        images = {path.name: path.read_bytes() for path in sorted(Path(source).glob("*.jpg"))}
    chosen = list(images.items())[:number]
    if out:
        with zipfile.ZipFile(out, "w") as archive:
            for name, data in chosen:
                archive.writestr(name, data)
    return len(chosen)
