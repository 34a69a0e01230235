"""Benchmark of a set of a million samples: planning, index and opening, without pixels.

    python benchmarks/scale.py [--samples 1000000]

Names, sizes and checksums are generated; no picture is decoded and no shard is written. The steps of a build run one
after the other in one process, on the project's own functions. A set is opened, and shown by `isic-shards info`, in
processes of their own, interpreter start and imports included.

    pair        find the image of each mask among twice as many files
    digest      of the names, sizes and times of all files
    split       by the hash of each key
    plan        which sample is in which shard, and which part of the work
    duplicates  near-duplicates among random hashes of the images
    index       sample tables, lists and index, written to a memory file system where there is one
    open        the index and all sample tables, read and checked
    info        isic-shards info, which decodes 64 masks of each split; the shards contain nothing else
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np

from shards import codecs, format, layout
from shards.format import ShardEntry
from shards.inputs.match import pair_files
from shards.inputs.source import File
from shards.mask_statistics import sampled_masks
from shards.planning.duplicates import HASH_BYTES, near_pairs
from shards.planning.plan import (
    BuildOptions,
    PlannedShard,
    digest_of_files,
    plan_shards,
    split_into_parts,
    splits_by_hash,
)
from shards.reader import ShardSet
from shards.writing.index import publish_index
from shards.writing.records import SampleRow, ShardRecord
from shards.writing.target import WORK, open_target

MASK = codecs.encode_mask(np.eye(512, dtype=np.uint8))
ROOT = Path(__file__).resolve().parent.parent
OPEN = """
import sys
from shards.reader import ShardSet
shard_set = ShardSet.open(sys.argv[1])
print(sum(len(shard_set.split(name)) for name in shard_set.index.splits))
"""
Row = tuple[str, float, float, float]
"""Name, wall seconds, CPU seconds, and the most megabytes that its process had until then."""


def record_of(shard: PlannedShard, random: np.random.Generator) -> ShardRecord:
    """What packing a shard would have recorded."""
    rows, offset = [], 0
    numbers = random.integers((40_000, 250, 800, 3_000), (80_000, 350, 2_000, 9_000), (len(shard.pairs), 4))
    crcs = random.integers(0, 2**32, (len(shard.pairs), 4))
    numbers[:, format.MASK], crcs[:, format.MASK] = len(MASK), zlib.crc32(MASK)
    areas = random.integers(0, 512 * 512, len(shard.pairs)).tolist()
    for pair, sizes, crc, area in zip(shard.pairs, numbers.tolist(), crcs.tolist(), areas, strict=True):
        if shard.split == "train":
            sizes[format.ORIGINAL] = 0
        rows.append(SampleRow(pair.key, offset, sizes, crc, 450, 600, area))
        offset += layout.sample_bytes(sizes)
    size = layout.shard_bytes(offset)
    entry = ShardEntry(name=shard.name, samples=len(rows), bytes=size, sha256=f"{offset:064x}")
    return ShardRecord(entry=entry, rows=rows, flags={})


def build(samples: int, out: Path) -> list[Row]:
    """The steps of a build, but for the pixels."""
    rows: list[Row] = []
    random, options = np.random.default_rng(0), BuildOptions()

    @contextmanager
    def measured(name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        rows.append((name, time.perf_counter() - wall, time.process_time() - cpu, peak))

    with measured("(the names of the files)"):
        files = [File(0, f"ISIC_{n:07d}.jpg", 50_000 + n, changed=n) for n in range(samples)]
        files += [File(1, f"ISIC_{n:07d}_segmentation.png", 5_000 + n, changed=n) for n in range(samples)]
        hashes = random.integers(0, 256, (samples, HASH_BYTES), dtype=np.uint8)
    with measured("pair"):
        pairing = pair_files(files)
    with measured("digest"):
        digest = digest_of_files(files, with_times=True)
    with measured("split"):
        splits = splits_by_hash(pairing.pairs, {}, options)
    with measured("plan"):
        shards = plan_shards(pairing.pairs, splits, options)
        split_into_parts(shards, options, encoding_pass=0)
    with measured("duplicates"):
        near_pairs(hashes)
    with measured("(the records of the shards)"):
        records = [record_of(shard, random) for shard in shards]
    with measured("index"):
        built = {**options.to_json(), "inputs": digest}
        publish_index(open_target(out), built, pairing, records, [], [])
    with measured("(the masks that info decodes)"):
        write_masks(out)
    return rows


def write_masks(out: Path) -> None:
    """Make sparse shards with the masks that `isic-shards info` decodes."""
    shard_set = ShardSet.open(out)
    for split in map(shard_set.split, shard_set.index.splits):
        for index in sampled_masks(len(split)):
            row = split.table[index]
            start, _ = layout.member_spans(int(row["offset"]), row["size"].tolist())[format.MASK]
            path = out / split.entries[row["shard"]].name
            path.parent.mkdir(exist_ok=True)
            with path.open("ab"):  # creates it
                os.truncate(path, split.entries[row["shard"]].bytes)
            with path.open("r+b") as file:
                file.seek(start)
                file.write(MASK)


def run(name: str, *words: str | Path) -> Row:
    """A command in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    wall = time.perf_counter()
    process = subprocess.Popen([sys.executable, *words], env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - wall
    if status:
        raise SystemExit(f"error: {name} ended with status {status}")
    return name, wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main() -> None:
    """Measure and write the result as benchmarks/results/<date>-scale.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.build:
        print(json.dumps(build(given.samples, given.build)))
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        folder, load = Path(name), os.getloadavg()[0]
        (folder / WORK).mkdir()
        # In a process of its own: a child begins with the peak of its parent.
        words = [sys.executable, __file__, "--samples", str(given.samples), "--build", str(folder)]
        rows = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)
        # Three times each, in turns, after one to warm up; the medians by wall time.
        turns = [(run("open", "-c", OPEN, folder), run("info", "-m", "shards", "info", folder)) for _ in range(4)]
        rows += [sorted(column)[1] for column in zip(*turns[1:], strict=True)]
        size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) / 1e6
        shards = sum(len(split.shards) for split in ShardSet.open(folder).index.splits.values())
    table = "\n".join(f"| {name} | {wall:.2f} | {cpu:.2f} | {peak:.0f} |" for name, wall, cpu, peak in rows)
    text = f"""# A set of {given.samples:,} samples, {date.today()}

Generated entries, {shards:,} shards; tables and index take {size:.0f} MB (`python benchmarks/scale.py`). Load of the
machine before: {load:.1f}. The rows above `open` are one process, one after the other; those in brackets make its
input, and a peak is the highest until then. `open` and `info` include the start of the interpreter.

| step | seconds | CPU s | peak MB |
|---|---|---|---|
{table}

{platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, numpy {version("numpy")}
"""
    print(text)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / f"{date.today()}-scale.md").write_text(text)


if __name__ == "__main__":
    main()
