"""Benchmark of reading batches, next to the ceiling of the codecs and other loaders.

    python benchmarks/stream.py --data SET [--data SET …]

SET is a shard set of one size with a split `train`. Every contender is a process of its own with two workers, reads
the very same JPEGs and 1-bit PNGs, from the page cache or a memory file system, and gives shuffled uint8 batches of
16: images (16, 3, H, W) and masks. After one epoch to warm up, epochs are timed. Contenders take turns; ratios are
taken within a round, and the median is over the rounds.

    ceiling            two processes that only decode into preallocated arrays, with the codecs of isicdist
    ceiling-pillow     the same, with Pillow for the masks
    isicdist           this project: two threads
    isicdist-cached    the same, from the second epoch on with --stream.decoded-cache
    isicdist-processes two forked processes that decode into a shared ring of slots: what threads were chosen over
    webdataset, mosaicml, litdata, folder
                       webdataset's documented pipeline, mosaicml-streaming, litdata, a torch Dataset over files; each
                       under a DataLoader with persistent workers, with Pillow, and (…-simplejpeg) with simplejpeg

`--beside-step` times the train step instead (the Improved UNet, in bf16 where the CPU has it), with the batches of a
contender against one that is there already: by how much a loader slows the training on the same cores.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import simplejpeg
from loaders import BATCH, WORKERS, import_streaming, open_contender, open_isicdist

ROOT = Path(__file__).resolve().parent.parent
PEERS = {"webdataset": "webdataset", "mosaicml": "streaming", "litdata": "litdata", "folder": "torch"}
OURS = ("isicdist", "isicdist-cached", "isicdist-processes")
CONTENDERS = ("ceiling", "ceiling-pillow", *OURS, *(peer + codec for peer in PEERS for codec in ("", "-simplejpeg")))
BESIDE = ("no loader", "isicdist", "isicdist-processes", *(f"{peer}-simplejpeg" for peer in PEERS))


# One measurement, in a process of its own.


def run_ceiling(data: Path, seconds: float, *, pillow: bool) -> dict[str, float]:
    """Two processes that decode and do nothing else, into arrays that are there."""
    context = multiprocessing.get_context("fork")
    start, ends = context.Barrier(WORKERS), [context.Pipe() for _ in range(WORKERS)]

    def work(share: int) -> None:
        from PIL import Image

        from shards import codecs, format
        from shards.reader import ShardSet

        split = ShardSet.open(data).split("train")
        size = split.size or 0
        images, masks = np.zeros((BATCH, size, size, 3), np.uint8), np.zeros((BATCH, size, size), np.uint8)
        numbers = range(share, len(split), WORKERS)
        parts = [(split.read(number, format.IMAGE), split.read(number, format.MASK)) for number in numbers]

        def epoch() -> None:
            for place, (jpg, png) in enumerate(parts):
                simplejpeg.decode_jpeg(jpg, "RGB", buffer=images[place % BATCH])
                if pillow:
                    masks[place % BATCH] = np.array(Image.open(io.BytesIO(png)), dtype=np.uint8)
                else:
                    codecs.decode_mask(png, masks[place % BATCH])

        epoch()
        start.wait()
        begun, spent, done = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - begun < seconds:
            epoch()
            done += len(parts)
        ends[share][1].send((done, time.perf_counter() - begun, time.process_time() - spent))

    processes = [context.Process(target=work, args=(share,)) for share in range(WORKERS)]
    for process in processes:
        process.start()
    results = [end.recv() for end, _ in ends]
    samples, cpu = sum(done for done, *_ in results), sum(spent for *_, spent in results)
    rate = sum(done / wall for done, wall, _ in results)
    return {"rate": rate, "cpu": 1000 * cpu / samples, "first": float("nan"), "memory": float("nan")}


def run_loader(name: str, data: Path, folder: Path, seconds: float) -> dict[str, float]:
    """Samples per second, CPU milliseconds a sample, seconds to the first batch, megabytes (PSS) of all processes."""
    epoch = open_contender(name, data, folder)
    begun = time.perf_counter()
    batches = epoch()
    next(batches)
    first = time.perf_counter() - begun
    for _ in batches:
        pass
    begun, spent, samples = time.perf_counter(), cpu_seconds(), 0
    while time.perf_counter() - begun < seconds:
        for images, masks in epoch():
            assert len(images) == len(masks)
            samples += len(images)
    wall, cpu = time.perf_counter() - begun, cpu_seconds() - spent
    batches = epoch()
    for _ in range(5):
        next(batches)
    return {"rate": samples / wall, "cpu": 1000 * cpu / samples, "first": first, "memory": memory()}


def run_step(name: str, data: Path, folder: Path, seconds: float) -> dict[str, float]:
    """Milliseconds of a train step that takes each batch of a contender, or one batch again and again."""
    import torch

    from isicdist.distributed.launch import disable_malloc_trim
    from isicdist.network.cpu_precision import faster_cpu_precision
    from isicdist.network.loss import segmentation_loss
    from isicdist.network.normalise import normalise, to_unit
    from isicdist.network.unet import ImprovedUNet

    disable_malloc_trim()  # as a run does
    torch.manual_seed(0)
    narrow = faster_cpu_precision() == "bf16"
    model = ImprovedUNet()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)

    def step(images: torch.Tensor, masks: torch.Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            logits = model(normalise(to_unit(images)), torch.arange(len(images)))
        segmentation_loss(logits, masks.reshape(logits.shape)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    if name == "no loader":
        [*ready] = next(open_isicdist(data)())
        fixed = [part.clone() for part in ready]

        def epoch() -> Iterator[Any]:
            return iter([fixed] * 20)
    else:
        epoch = open_contender(name, data, folder)
    batches = itertools.chain.from_iterable(iter(epoch, None))  # one epoch after the other
    for batch in itertools.islice(batches, 2):
        step(*batch)
    begun, spent, steps = time.perf_counter(), cpu_seconds(), 0
    while time.perf_counter() - begun < seconds:
        step(*next(batches))
        steps += 1
    wall, cpu = time.perf_counter() - begun, cpu_seconds() - spent
    return {"step": 1000 * wall / steps, "cpu": 1000 * cpu / steps}


def family() -> list[psutil.Process]:
    me = psutil.Process()
    return [me, *me.children(recursive=True)]


def cpu_seconds() -> float:
    """CPU seconds of this process and all that it started and that still run."""
    return sum(times.user + times.system for times in (process.cpu_times() for process in family()))


def memory() -> float:
    """Proportional memory of this process and all that it started, in 10^6 bytes."""
    return sum(process.memory_full_info().pss for process in family()) / 1e6


# All measurements.


def prepare(data: Path, folder: Path, peers: list[str]) -> int:
    """Copy the samples of the set into `folder` for each peer; returns how many there are."""
    from shards import format
    from shards.reader import ShardSet

    split = ShardSet.open(data).split("train")
    samples = [
        (split.key(n), bytes(split.read(n, format.IMAGE)), bytes(split.read(n, format.MASK))) for n in range(len(split))
    ]
    (folder / "files").mkdir()
    for key, jpg, png in samples:
        (folder / "files" / f"{key}.jpg").write_bytes(jpg)
        (folder / "files" / f"{key}.png").write_bytes(png)
    if "mosaicml" in peers:
        with import_streaming().MDSWriter(
            out=str(folder / "mosaicml"), columns={"jpg": "bytes", "png": "bytes"}
        ) as writer:
            for _, jpg, png in samples:
                writer.write({"jpg": jpg, "png": png})
    if "litdata" in peers:
        importlib.import_module("litdata").optimize(
            fn=FromFiles(folder / "files"),
            inputs=[key for key, *_ in samples],
            output_dir=str(folder / "litdata"),
            chunk_bytes="16MB",
            num_workers=1,
        )
    return len(samples)


class FromFiles:
    """A sample of litdata."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, key: str) -> dict[str, bytes]:
        return {
            "jpg": (self.folder / f"{key}.jpg").read_bytes(),
            "png": (self.folder / f"{key}.png").read_bytes(),
        }


def measure(kind: str, name: str, data: Path, folder: Path, seconds: float) -> dict[str, float]:
    """One measurement in a new process."""
    words = [sys.executable, __file__, "--run", name, kind, "--data", data, "--folder", folder, "--seconds", seconds]
    threads = {"OMP_NUM_THREADS": str(WORKERS if kind == "step" else 1)}
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, **threads, "PYTHONPATH": paths}
    # What one leaves behind is nothing to the next; the decoded cache lies on a disk.
    with tempfile.TemporaryDirectory(dir=folder) as own, tempfile.TemporaryDirectory(dir="/var/tmp") as cache:
        environment |= {"TMPDIR": own, "HOME": own, "ISICDIST_CACHE": cache}
        done = subprocess.run([str(word) for word in words], env=environment, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise SystemExit(f"error: {name} ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def median_of(rounds: list[dict[str, dict[str, float]]], name: str, what: str) -> float:
    return statistics.median(measured[name][what] for measured in rounds)


def speed_table(rounds: list[dict[str, dict[str, float]]], names: list[str]) -> str:
    """The medians as a Markdown table."""
    lines = [
        "| contender | samples/s | of the ceiling | CPU ms a sample | first batch, s | PSS, MB |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        rate, cpu, first, pss = (median_of(rounds, name, what) for what in ("rate", "cpu", "first", "memory"))
        ratio = statistics.median(measured[name]["rate"] / measured["ceiling"]["rate"] for measured in rounds)
        rest = " | | |" if name.startswith("ceiling") else f" | {first:.2f} | {pss:.0f} |"
        lines.append(f"| {name} | {rate:.0f} | {ratio:.2f} | {cpu:.2f}{rest}")
    return "\n".join(lines)


def step_table(rounds: list[dict[str, dict[str, float]]], names: list[str]) -> str:
    """The medians as a Markdown table."""
    lines = ["| loader | ms a step | longer by | CPU ms a step |", "|---|---|---|---|"]
    for name in names:
        longer = statistics.median(measured[name]["step"] / measured["no loader"]["step"] - 1 for measured in rounds)
        step, cpu = median_of(rounds, name, "step"), median_of(rounds, name, "cpu")
        lines.append(f"| {name} | {step:.1f} | {100 * longer:.1f} % | {cpu:.1f} |")
    return "\n".join(lines)


def order_line() -> str:
    """How long a million samples take to be ordered."""
    from types import SimpleNamespace

    from isicdist.data.order import epoch_order

    index: Any = SimpleNamespace(digest="", shard_samples=np.full(3907, 256))
    taken = {}
    for what, window in (("all shards", None), ("16 shards", 16)):
        times = []
        for epoch in range(5):
            begun = time.perf_counter()
            epoch_order(index, 0, epoch, window)
            times.append(time.perf_counter() - begun)
        taken[what] = 1000 * statistics.median(times)
    return "A million samples are ordered in " + ", ".join(
        f"{taken[what]:.0f} ms ({what} shuffled together)" for what in taken
    )


def main() -> None:
    """Measure, and add what came out to benchmarks/results/<date>-stream.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, action="append", required=True, help="shard set of one size")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one measurement")
    parser.add_argument("--beside-step", action="store_true", help="time a train step beside the loaders")
    parser.add_argument("--only", nargs="+", help="these contenders only, and what they are compared with")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        name, kind = given.run
        if kind == "step":
            result = run_step(name, given.data[0], given.folder, given.seconds)
        elif name.startswith("ceiling"):
            result = run_ceiling(given.data[0], given.seconds, pillow=name.endswith("pillow"))
        else:
            result = run_loader(name, given.data[0], given.folder, given.seconds)
        print("\n" + json.dumps(result), flush=True)
        for worker in family()[1:]:
            worker.kill()
        os._exit(0)  # without the loaders' long goodbyes
    peers = [peer for peer, module in PEERS.items() if importlib.util.find_spec(module)]
    missing = sorted(set(PEERS) - set(peers))
    names = [
        name
        for name in (BESIDE if given.beside_step else CONTENDERS)
        if name.partition("-")[0] not in missing and (not given.only or name in (*given.only, "ceiling", "no loader"))
    ]
    kind, table = ("step", step_table) if given.beside_step else ("loader", speed_table)
    parts = [f"# Reading batches{' beside a train step' if given.beside_step else ''}, {date.today()}"]
    for data in given.data:
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as own:
            samples, load, rounds = prepare(data, Path(own), peers), os.getloadavg()[0], []
            for number in range(given.rounds):
                rounds.append({name: measure(kind, name, data, Path(own), given.seconds) for name in names})
                shown = {name: round(next(iter(result.values())), 1) for name, result in rounds[-1].items()}
                print(number, shown, flush=True)
        side = json.loads((data / "index.json").read_text())["size"]
        parts.append(f"## {side} × {side}, {samples} samples\n\nLoad of the machine before: {load:.1f}.")
        parts.append(table(rounds, names))
    packages = ("numpy", "pillow", "simplejpeg", "torch", "webdataset", "mosaicml-streaming", "litdata")
    installed = []
    for package in packages:
        with suppress(PackageNotFoundError):
            installed.append(f"{package} {version(package)}")
    parts.append(
        f"Batches of {BATCH}, {WORKERS} workers, medians of {given.rounds} rounds of {given.seconds:g} s a contender "
        f"(`python benchmarks/stream.py{' --beside-step' if given.beside_step else ''}`).\n"
        + (f"Not installed: {', '.join(missing)}.\n" if missing else "")
        + f"{order_line()}.\n{platform.machine()}, {len(os.sched_getaffinity(0))} cores, "
        f"Python {platform.python_version()}, {', '.join(installed)}"
    )
    text = "\n\n".join(parts) + "\n"
    print(text)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / f"{date.today()}-stream{'-step' if given.beside_step else ''}.md").write_text(text)


if __name__ == "__main__":
    main()
