"""Benchmark of building shards, next to the ceiling of the codecs and other writers.

    python benchmarks/build.py --source DIR

Each contender is a process of its own, interpreter start and imports included, and makes 512 × 512 samples of the
same pairs with the same number of processes. They take turns; the ratios are taken within a round, and the median
is over the rounds. Inputs and outputs lie on a memory file system, and the code has been compiled before.

    bare         forked processes that only decode, resize and encode, in the least time that the codecs allow: JPEG
                 decoded at no less than the wanted size, area reduction, mask sampled at the nearest pixel; nothing
                 is checked, hashed or written
    ceiling      the same with more care: JPEG decoded at no less than twice the size, mask by area
    isic-shards  this project: checks every pair, finds duplicates, writes, hashes and syncs
    webdataset   a pool that does the work of bare, and webdataset's ShardWriter in the parent process
    pillow       as webdataset, with Pillow's codecs as the tutorials have them
    litdata      litdata.optimize with the work of bare
    mosaicml     a pool that does the work of bare, and mosaicml-streaming's MDSWriter in the parent process

With --copy the originals are packed as they are (--size original), beside GNU tar and webdataset's writer. What a
pair costs beside its bytes weighs less the larger it is; --enlarge F makes them as large as those of an archive.

The pairs: those of the source, then their mirrored and turned copies and four crops of each, so that no two show the
same picture. litdata and mosaicml are left out where they cannot be imported.
"""

from __future__ import annotations

import argparse
import importlib
import io
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SIDE = 512
MASK = "_segmentation.png"
ROOT = Path(__file__).resolve().parent.parent
ENCODERS = ("bare", "ceiling", "isic-shards", "webdataset", "pillow", "litdata", "mosaicml")
COPIERS = ("tar", "isic-shards-copy", "webdataset-copy")
MODULES = {"litdata": "litdata", "mosaicml": "streaming"}
PARTS = ((0, 0, 1, 1), (0, 0, 0.75, 1), (0.25, 0, 1, 1), (0, 0, 1, 0.75), (0, 0.25, 1, 1))  # of width and height
VIEWS = [(turn, part) for part in PARTS for turn in (None, *range(7))]  # Pillow's seven turns and mirrors


def mask_of(image: Path) -> Path:
    """The mask that lies beside an image."""
    return image.with_name(image.stem + MASK)


def encode(image: Path, margin: float = 1) -> tuple[bytes, bytes]:
    """One pair with the best codecs: JPEG decoded at no less than `margin` times the size, area reduction, 1-bit PNG.

    With a margin of 1 the mask is sampled at the nearest pixel, else reduced by area.
    """
    import numpy as np
    import simplejpeg
    from PIL import Image

    data = image.read_bytes()
    height, width = map(int, simplejpeg.decode_jpeg_header(data)[:2])
    scale = margin * SIDE / min(height, width)
    least = (int(height * scale), int(width * scale)) if scale < 1 else (0, 0)
    pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=least[0], min_width=least[1])
    small = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BOX)
    jpeg = simplejpeg.encode_jpeg(np.asarray(small), quality=95, colorspace="RGB", colorsubsampling="420")
    method = Image.Resampling.NEAREST if margin == 1 else Image.Resampling.BOX
    with Image.open(mask_of(image)) as picture:
        mask = np.asarray(picture.resize((SIDE, SIDE), method)) > 127
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    return jpeg, buffer.getvalue()


def encode_with_pillow(image: Path) -> tuple[bytes, bytes]:
    """One pair as the tutorials do it: decoded in full, 8-bit PNG."""
    from PIL import Image

    out = io.BytesIO(), io.BytesIO()
    with Image.open(image) as picture:
        picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX).save(out[0], "JPEG", quality=95)
    with Image.open(mask_of(image)) as picture:
        picture.resize((SIDE, SIDE), Image.Resampling.NEAREST).save(out[1], "PNG")
    return out[0].getvalue(), out[1].getvalue()


def sample(image: Path) -> dict[str, Any]:
    """What webdataset's writer takes, with the best codecs."""
    jpeg, png = encode(image)
    return {"__key__": image.stem, "jpg": jpeg, "mask.png": png}


def sample_with_pillow(image: Path) -> dict[str, Any]:
    """What webdataset's writer takes, with Pillow."""
    jpeg, png = encode_with_pillow(image)
    return {"__key__": image.stem, "jpg": jpeg, "mask.png": png}


def copied(image: Path) -> dict[str, Any]:
    """What webdataset's writer takes, the files as they are."""
    return {"__key__": image.stem, "jpg": image.read_bytes(), "mask.png": mask_of(image).read_bytes()}


def fields(image: Path) -> dict[str, Any]:
    """What litdata and mosaicml-streaming take, with the best codecs."""
    jpeg, png = encode(image)
    return {"key": image.stem, "image": jpeg, "mask": png}


def run_ceiling(images: list[Path], workers: int, margin: float) -> None:
    """Shares of the work in forked processes, nothing written."""
    import numpy as np  # noqa: F401  before the fork
    import simplejpeg  # noqa: F401
    from PIL import Image  # noqa: F401

    def share(part: list[Path]) -> None:
        for image in part:
            encode(image, margin)

    context = multiprocessing.get_context("fork")
    shares = [context.Process(target=share, args=(images[i::workers],)) for i in range(workers)]
    for process in shares:
        process.start()
    for process in shares:
        process.join()


def run_isic_shards(source: Path, out: Path, workers: int, size: int | str) -> None:
    """This project's command."""
    from shards.cli import main

    words = ["--images", source, "--masks", source, "--out", out, "--size", size, "--workers", workers]
    main(["build", *map(str, words), "--split", "train=1"])


def run_webdataset(images: list[Path], out: Path, workers: int, work: Callable[[Path], dict[str, Any]]) -> None:
    """A pool, and the writer in this process."""
    from webdataset.writer import ShardWriter

    out.mkdir()
    with (
        multiprocessing.get_context("fork").Pool(workers) as pool,
        ShardWriter(str(out / "%06d.tar"), maxcount=256, verbose=0) as writer,
    ):
        for made in pool.imap(work, images):
            writer.write(made)


def run_litdata(images: list[Path], out: Path, workers: int) -> None:
    """litdata's own processes."""
    litdata = importlib.import_module("litdata")
    litdata.optimize(fn=fields, inputs=images, output_dir=str(out), num_workers=workers, chunk_bytes="64MB")


def run_mosaicml(images: list[Path], out: Path, workers: int) -> None:
    """A pool, and the writer in this process."""
    writer_of = importlib.import_module("streaming").MDSWriter
    columns = {"key": "str", "image": "bytes", "mask": "bytes"}
    with (
        multiprocessing.get_context("fork").Pool(workers) as pool,
        writer_of(out=str(out), columns=columns) as writer,
    ):
        for made in pool.imap(fields, images):
            writer.write(made)


def run_contender(name: str, source: Path, out: Path, workers: int) -> None:
    """Build once, in this process and those it starts."""
    images = sorted(source.glob("*.jpg"))
    contenders: dict[str, Callable[[], object]] = {
        "bare": lambda: run_ceiling(images, workers, 1),
        "ceiling": lambda: run_ceiling(images, workers, 2),
        "isic-shards": lambda: run_isic_shards(source, out, workers, SIDE),
        "webdataset": lambda: run_webdataset(images, out, workers, sample),
        "pillow": lambda: run_webdataset(images, out, workers, sample_with_pillow),
        "litdata": lambda: run_litdata(images, out, workers),
        "mosaicml": lambda: run_mosaicml(images, out, workers),
        "tar": lambda: subprocess.run(["tar", "-cf", str(out), "-C", str(source), "."], check=True),
        "isic-shards-copy": lambda: run_isic_shards(source, out, workers, "original"),
        "webdataset-copy": lambda: run_webdataset(images, out, workers, copied),
    }
    contenders[name]()


def make_pair(item: tuple[str, int, float, Path, Path, Path]) -> None:
    """Write one pair: an original as it is, or another view of it; enlarged, its JPEGs are of quality 98."""
    from PIL import Image, JpegImagePlugin

    key, view, enlarge, image, mask, folder = item
    turn, part = VIEWS[view]
    for source, path in ((image, folder / f"{key}.jpg"), (mask, folder / f"{key}{MASK}")):
        if view == 0 and enlarge == 1:
            shutil.copyfile(source, path)
            continue
        with Image.open(source) as original:
            picture = original.copy() if turn is None else original.transpose(Image.Transpose(turn))
            as_before = isinstance(original, JpegImagePlugin.JpegImageFile)
            options: dict[str, Any] = {"qtables": original.quantization} if as_before else {}
        w, h = picture.size
        left, top, right, bottom = (round(side * edge) for side, edge in zip(part, (w, h, w, h), strict=True))
        picture = picture.crop((left, top, right, bottom))
        if enlarge != 1:
            picture, options = picture.resize([round(side * enlarge) for side in picture.size]), {"quality": 98}
        picture.save(path, **options)


def make_source(given: Path, folder: Path, pairs: int, workers: int, enlarge: float = 1) -> None:
    """Write that many pairs: the originals of `given`, then views of them, their sides `enlarge` times as long."""
    masks = {path.name.removesuffix(MASK): path for path in given.rglob(f"*{MASK}")}
    images = sorted(path for path in given.rglob("*.jpg") if path.stem in masks)
    if not images:
        raise SystemExit(f"error: {given}: no pair KEY.jpg, KEY{MASK} in it")
    if pairs > len(images) * len(VIEWS):
        raise SystemExit(f"error: --pairs {pairs}: {len(images)} originals give {len(images) * len(VIEWS)} at most")
    work = []
    for number in range(pairs):
        view, place = divmod(number, len(images))
        work.append((f"P{number:06d}", view, enlarge, images[place], masks[images[place].stem], folder))
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        pool.map(make_pair, work, chunksize=4)


def measure(name: str, source: Path, folder: Path, workers: int) -> tuple[float, float]:
    """Wall and CPU seconds of one build in a new process."""
    out = folder / "out"
    words = [sys.executable, __file__, "--run", name, "--source", source, "--out", out, "--workers", workers]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPYCACHEPREFIX"] = str(folder / "compiled")  # as installed packages are
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    before, start = os.times(), time.perf_counter()
    command = [str(word) for word in words]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"error: {name}: {(ended.stderr.splitlines() or ['?'])[-1]}")
    wall, after = time.perf_counter() - start, os.times()
    shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return wall, cpu


def can_import(name: str) -> bool:
    """Whether a contender is here; says so where it is not."""
    command = [sys.executable, "-c", f"import {MODULES[name]}"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        print(f"{name} is left out: {(found.stderr.splitlines() or ['it cannot be imported'])[-1]}")
    return not found.returncode


def table(rounds: list[dict[str, tuple[float, float]]], pairs: int, megabytes: float) -> str:
    """The medians as a Markdown table; ratios to the first contender."""
    first = next(iter(rounds[0]))
    lines = [f"| contender | seconds | pairs/s | MB/s | CPU s | of {first} | by CPU |", "|---|---|---|---|---|---|---|"]
    for name in rounds[0]:
        wall = statistics.median(times[name][0] for times in rounds)
        cpu = statistics.median(times[name][1] for times in rounds)
        ratio = statistics.median(times[first][0] / times[name][0] for times in rounds)
        by_cpu = statistics.median(times[first][1] / times[name][1] for times in rounds)
        speed = f"{pairs / wall:.1f} | {megabytes / wall:.0f}"
        lines.append(f"| {name} | {wall:.2f} | {speed} | {cpu:.2f} | {ratio:.2f} | {by_cpu:.2f} |")
    return "\n".join(lines)


def versions() -> str:
    """Of what was measured."""
    found = []
    for package in ("numpy", "pillow", "simplejpeg", "webdataset", "torch", "litdata", "mosaicml-streaming"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def main() -> None:
    """Measure and add the result to benchmarks/results/<date>-build.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder with KEY.jpg and KEY_segmentation.png")
    parser.add_argument("--pairs", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--copy", action="store_true", help="pack the originals as they are")
    parser.add_argument("--enlarge", type=float, default=1, help="times that the sides of the pictures are longer")
    parser.add_argument("--only", nargs="+", choices=ENCODERS + COPIERS, help="the contenders")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--run", choices=ENCODERS + COPIERS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        run_contender(given.run, given.source, given.out, given.workers)
        return
    names = given.only or [n for n in (COPIERS if given.copy else ENCODERS) if n not in MODULES or can_import(n)]
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        folder = Path(name)
        (folder / "in").mkdir()
        make_source(given.source, folder / "in", given.pairs, given.workers, given.enlarge)
        megabytes = sum(path.stat().st_size for path in (folder / "in").iterdir()) / 1e6
        load = os.getloadavg()[0]
        rounds = []
        for number in range(given.rounds + 1):
            times = {name: measure(name, folder / "in", folder, given.workers) for name in names}
            if number:  # the first warms the page cache up, and compiles
                rounds.append(times)
            print(number, {name: round(wall, 2) for name, (wall, _) in times.items()}, flush=True)
    what = "copied as they are" if given.copy else f"to {SIDE} × {SIDE}"
    what += f", enlarged {given.enlarge:g} times" if given.enlarge != 1 else ""
    text = f"""
## {given.pairs} pairs {what}

{megabytes:.0f} MB of input, {given.workers} processes, medians of {given.rounds} rounds after one to warm up. Load of \
the machine before the first round: {load:.1f}.

{table(rounds, given.pairs, megabytes)}

{platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, {versions()}
"""
    print(text)
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"{date.today()}-build.md"
    head = (
        f"# Building shards, {date.today()}\n\nBy `python benchmarks/build.py`, which says what the contenders are.\n"
    )
    path.write_text((path.read_text() if path.exists() else head) + text)


if __name__ == "__main__":
    main()
