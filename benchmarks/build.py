"""How fast shards are built, beside the ceiling and a plain webdataset writer: python benchmarks/build.py --source DIR

Each contender is a process of its own, interpreter start and imports included, and makes 512 × 512 samples of the
same pairs with the same number of processes. They take turns; the ratios are taken within a round, and the median
is over the rounds. The source's pairs are copied under other keys until there are enough, to a memory file system.

    ceiling      forked processes that only decode, resize and encode with the best codecs at hand; nothing is written
    webdataset   a pool that does the same work, and webdataset's ShardWriter in the parent process
    pillow       as webdataset, with Pillow's codecs as the tutorials have them
    isic-shards  this project: finds duplicates, checks every pair, writes, hashes and syncs
"""

from __future__ import annotations

import argparse
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
from datetime import date
from importlib.metadata import version
from pathlib import Path

SIDE = 512
MASK = "_segmentation.png"
CONTENDERS = ("ceiling", "webdataset", "pillow", "isic-shards")
ROOT = Path(__file__).resolve().parent.parent


def encode(image: Path, mask: Path) -> tuple[bytes, bytes]:
    """One pair with the best codecs: JPEG decoded at a reduced scale, area resize, 1-bit PNG."""
    import numpy as np
    import simplejpeg
    from PIL import Image

    pixels = simplejpeg.decode_jpeg(image.read_bytes(), "RGB", min_height=2 * SIDE, min_width=2 * SIDE)
    small = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BOX)
    jpeg = simplejpeg.encode_jpeg(np.asarray(small), quality=95, colorspace="RGB", colorsubsampling="420")
    with Image.open(mask) as picture:
        area = picture.resize((SIDE, SIDE), Image.Resampling.BOX)
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(area) > 127).save(buffer, "PNG")
    return jpeg, buffer.getvalue()


def encode_with_pillow(image: Path, mask: Path) -> tuple[bytes, bytes]:
    """One pair as the tutorials do it: decoded in full, 8-bit PNG."""
    from PIL import Image

    out = io.BytesIO(), io.BytesIO()
    with Image.open(image) as picture:
        picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX).save(out[0], "JPEG", quality=95)
    with Image.open(mask) as picture:
        picture.resize((SIDE, SIDE), Image.Resampling.NEAREST).save(out[1], "PNG")
    return out[0].getvalue(), out[1].getvalue()


def sample(image: Path) -> dict[str, str | bytes]:
    """What webdataset's writer takes, with the best codecs."""
    jpeg, png = encode(image, image.with_name(image.stem + MASK))
    return {"__key__": image.stem, "jpg": jpeg, "mask.png": png}


def sample_with_pillow(image: Path) -> dict[str, str | bytes]:
    """What webdataset's writer takes, with Pillow."""
    jpeg, png = encode_with_pillow(image, image.with_name(image.stem + MASK))
    return {"__key__": image.stem, "jpg": jpeg, "mask.png": png}


def ceiling_share(images: list[Path]) -> None:
    """One process's share of the ceiling."""
    for image in images:
        encode(image, image.with_name(image.stem + MASK))


def run_contender(name: str, source: Path, out: Path, workers: int) -> None:
    """Build once, in this process and those it starts."""
    images = sorted(source.glob("*.jpg"))
    context = multiprocessing.get_context("fork")
    if name == "ceiling":
        import numpy as np  # noqa: F401  before the fork
        import simplejpeg  # noqa: F401
        from PIL import Image  # noqa: F401

        shares = [context.Process(target=ceiling_share, args=(images[i::workers],)) for i in range(workers)]
        for share in shares:
            share.start()
        for share in shares:
            share.join()
    elif name == "isic-shards":
        from shards.cli import main

        words = ["--images", source, "--masks", source, "--out", out, "--size", SIDE, "--workers", workers]
        main(["build", *map(str, words), "--split", "train=1"])
    else:
        from webdataset.writer import ShardWriter

        out.mkdir()
        work = sample if name == "webdataset" else sample_with_pillow
        with context.Pool(workers) as pool, ShardWriter(str(out / "%06d.tar"), maxcount=256, verbose=0) as writer:
            for made in pool.imap(work, images):
                writer.write(made)


def make_source(given: Path, folder: Path, pairs: int) -> None:
    """Copy the pairs of `given` to `folder` under other keys until there are `pairs`."""
    masks = {path.name.removesuffix(MASK): path for path in given.rglob(f"*{MASK}")}
    images = sorted(path for path in given.rglob("*.jpg") if path.stem in masks)
    if not images:
        raise SystemExit(f"error: {given}: no pair KEY.jpg, KEY{MASK} in it")
    for number in range(pairs):
        image = images[number % len(images)]
        shutil.copyfile(image, folder / f"P{number:06d}.jpg")
        shutil.copyfile(masks[image.stem], folder / f"P{number:06d}{MASK}")


def measure(name: str, source: Path, folder: Path, workers: int) -> tuple[float, float]:
    """Wall and CPU seconds of one build in a new process."""
    out = folder / "out"
    words = [sys.executable, __file__, "--run", name, "--source", source, "--out", out, "--workers", workers]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    before, start = os.times(), time.perf_counter()
    subprocess.run([str(word) for word in words], check=True, env=environment, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - start, os.times()
    shutil.rmtree(out, ignore_errors=True)
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return wall, cpu


def table(rounds: list[dict[str, tuple[float, float]]], pairs: int) -> str:
    """The medians as a Markdown table."""
    lines = ["| contender | seconds | pairs/s | CPU s | of the ceiling | by CPU |", "|---|---|---|---|---|---|"]
    for name in CONTENDERS:
        wall = statistics.median(times[name][0] for times in rounds)
        cpu = statistics.median(times[name][1] for times in rounds)
        ratio = statistics.median(times["ceiling"][0] / times[name][0] for times in rounds)
        by_cpu = statistics.median(times["ceiling"][1] / times[name][1] for times in rounds)
        lines.append(f"| {name} | {wall:.2f} | {pairs / wall:.1f} | {cpu:.2f} | {ratio:.2f} | {by_cpu:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and write the result as benchmarks/results/<date>-build.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder with KEY.jpg and KEY_segmentation.png")
    parser.add_argument("--pairs", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--run", choices=CONTENDERS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        run_contender(given.run, given.source, given.out, given.workers)
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        folder = Path(name)
        (folder / "in").mkdir()
        make_source(given.source, folder / "in", given.pairs)
        load = os.getloadavg()[0]
        rounds = []
        for number in range(given.rounds + 1):
            times = {name: measure(name, folder / "in", folder, given.workers) for name in CONTENDERS}
            if number:  # the first warms the page cache up
                rounds.append(times)
            print(number, {name: round(wall, 2) for name, (wall, _) in times.items()}, flush=True)
    packages = ("numpy", "pillow", "simplejpeg", "webdataset", "torch")
    text = f"""# Building shards, {date.today()}

{given.pairs} pairs to {SIDE} × {SIDE}, {given.workers} processes, medians of {given.rounds} rounds after one to warm up
(`python benchmarks/build.py`). Load of the machine before the first round: {load:.1f}.

{table(rounds, given.pairs)}

{platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, \
{", ".join(f"{package} {version(package)}" for package in packages)}
"""
    print(text)
    (given.out / f"{date.today()}-build.md").write_text(text)


if __name__ == "__main__":
    main()
