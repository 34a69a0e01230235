"""Build a shard set: find and pair, plan, pack the shards in parallel processes, publish the index last.

A build that was killed is completed by running it again: DIR/.build holds a record of every shard that is done.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from shards import format
from shards.duplicates import Duplicate, hashes, joined, kind_of, near_pairs
from shards.errors import SourceError, UsageError
from shards.pack import WORK, Sample, ShardRecord, check_shard, encode_part, publish, record_path, write_shard
from shards.plan import TRAIN, BuildOptions, PlannedShard, check_groups, digest_of_files, plan_shards, splits_by_hash
from shards.pool import Work, in_parallel
from shards.reader import ShardSet
from shards.source import BadInputError, Pair, Pairing, Rejected, Source, find, pair_files
from shards.split import in_order, read_groups, read_split_file

PLAN = "plan.json"
DUPLICATES = "duplicates.json"
HASHED = 64  # images that a process compares at a time
PART = 4  # samples that a process encodes at a time where shards are few
Report = Callable[[int, int, str], None]
"""Called now and then with the number of items done, of all items, and what is done to them."""


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """A complete shard set."""

    root: Path
    index: dict[str, Any]
    already: bool
    """It was complete before this build, which left it as it is."""


def build(
    images: str,
    masks: str,
    out: str | Path,
    options: BuildOptions | None = None,
    *,
    workers: int | None = None,
    report: Report = lambda done, total, title: None,
) -> BuildResult:
    """Pack the pairs of two places (paths or URLs; they may be one) into a shard set at `out`.

    The bytes depend on inputs and options only. Raises SourceError, BadInputError when inputs are bad and
    `options.on_bad_input` is fail (then nothing is left behind), UsageError when `out` holds something else.
    """
    options = options or BuildOptions()
    workers = _cores() if workers is None else workers
    if workers < 1:
        raise UsageError(f"--workers {workers}: give 1 or more")
    root = Path(out)
    sources, files = find([images, masks])
    pairing = pair_files(files, options.mask_suffix)
    keys = [pair.key for pair in pairing.pairs]
    groups = read_groups(options.groups, keys) if options.groups else {}
    given = read_split_file(options.split_file, keys) if options.split_file else {}
    if given:
        check_groups(given, groups)
    built = {**options.to_json(), "inputs": digest_of_files(files, with_times=False)}
    if (root / format.INDEX_NAME).exists():
        shard_set = ShardSet.open(root)
        _refuse_other(root, shard_set.index["built"], built)
        shutil.rmtree(root / WORK, ignore_errors=True)  # of a build that was killed just before its end
        return BuildResult(root=root, index=shard_set.index, already=True)

    made = _start(root, {**built, "times": digest_of_files(files, with_times=True)})
    run = _Run(root=root, sources=sources, options=options, workers=workers, report=report)
    try:
        if pairing.rejected and options.on_bad_input == "fail":  # said before any word about splits
            in_one_split = plan_shards(pairing.pairs, dict.fromkeys(keys, TRAIN), groups, options)
            bad = pairing.rejected + run.check(in_one_split)
            raise BadInputError(sorted(bad, key=lambda row: row.path))
        duplicates = run.duplicates(pairing.pairs)
        splits = given or splits_by_hash(keys, groups, joined(groups, duplicates), options)
        shards = plan_shards(pairing.pairs, splits, groups, options)
        records = run.pack(shards)
        bad = sorted(pairing.rejected + [r for record in records for r in record.rejected], key=lambda r: r.path)
        if bad and options.on_bad_input == "fail":
            raise BadInputError(bad)
        index = _finish(root, built, options, pairing, records, bad, duplicates, splits)
    except SourceError:
        _clear(root, made)
        raise
    finally:
        for source in sources:
            source.close()
    return BuildResult(root=root, index=index, already=False)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _refuse_other(root: Path, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise UsageError that says what differs, unless the two builds are the same."""
    names = [name for name in sorted(there.keys() | wanted.keys()) if there.get(name) != wanted.get(name)]
    if not names:
        return
    opaque = {"inputs": "the input files", "times": "the input files' times of change"}
    told = [opaque.get(name) or f"{name} ({there.get(name)} there, {wanted.get(name)} here)" for name in names]
    raise UsageError(f"{root}: holds another build; it differs in {', '.join(told)}; give another --out or remove it")


def _start(root: Path, identity: dict[str, Any]) -> list[Path]:
    """Make the folder, or take up the build that was begun in it. Returns the folders made, the innermost first."""
    plan = root / WORK / PLAN
    if plan.exists():
        _refuse_other(root, json.loads(plan.read_bytes()), identity)
        for part in (root / WORK).glob("*.part"):
            part.unlink()
        return [root]
    if root.exists() and not root.is_dir():
        raise UsageError(f"{root}: a file is in the way; give a folder for --out")
    if root.is_dir() and any(path.name != WORK for path in root.iterdir()):
        raise UsageError(f"{root}: holds files that are no shard set; give a new or an empty folder for --out")
    made = [path for path in [root, *root.parents] if not path.exists()]
    (root / WORK).mkdir(parents=True, exist_ok=True)
    publish(root, plan, format.canonical_json(identity))
    return made


def _clear(root: Path, made: list[Path]) -> None:
    """Take away what this build made: the folder held nothing else when it began."""
    for path in root.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    for folder in made:
        if any(folder.iterdir()):  # another command's by now
            return
        folder.rmdir()


def _finish(
    root: Path,
    built: dict[str, Any],
    options: BuildOptions,
    pairing: Pairing,
    records: list[ShardRecord],
    rejected: list[Rejected],
    duplicates: list[Duplicate],
    split_of_key: Mapping[str, str],
) -> dict[str, Any]:
    """Publish the sample tables, the lists of rejected inputs and of duplicates and, last, the index."""
    splits = {}
    flags: Counter[str] = Counter()
    for name in in_order(split_of_key.values()):
        mine = [record for record in records if record.name.startswith(f"{name}/") and record.samples]
        table = _table(mine)
        publish(root, root / format.table_name(name), table)
        entry = {
            "name": format.table_name(name),
            "bytes": len(table),
            "sha256": hashlib.sha256(table).hexdigest(),
        }
        shards = [{k: getattr(r, k) for k in ("name", "samples", "bytes", "sha256")} for r in mine]
        splits[name] = {"samples": sum(r.samples for r in mine), "table": entry, "shards": shards}
        for record in mine:
            flags.update(record.flags)
    publish(root, root / format.REJECTED_NAME, _csv(("path", "reason", "detail"), map(astuple, rejected)))
    packed = {row[0] for record in records for row in record.rows}
    duplicates = sorted(d for d in duplicates if d.key in packed and d.of in packed)
    pairs = [(d.key, split_of_key[d.key], d.of, split_of_key[d.of], d.same, d.distance) for d in duplicates]
    columns = ("key", "split", "duplicate_of", "split_of_that", "same", "distance")
    publish(root, root / format.DUPLICATES_NAME, _csv(columns, pairs))
    same = Counter(duplicate.same for duplicate in duplicates)
    index = {
        "format": format.FORMAT,
        "version": format.VERSION,
        "size": options.size,
        "built": built,
        "counts": {
            "found": pairing.found,
            "packed": 2 * sum(record.samples for record in records),
            "rejected": len(rejected),
            "ignored": len(pairing.ignored),
            "flags": dict(sorted(flags.items())),
            "duplicates": dict(sorted(same.items())),
            "duplicates_across_splits": sum(row[1] != row[3] for row in pairs),
        },
        "splits": splits,
    }
    index["digest"] = format.digest_of(index)
    publish(root, root / format.INDEX_NAME, format.canonical_json(index))
    shutil.rmtree(root / WORK)
    return index


def _table(records: list[ShardRecord]) -> bytes:
    rows = [
        (key.encode(), shard, offset, sizes, crcs, height, width, foreground)
        for shard, record in enumerate(records)
        for key, offset, sizes, crcs, height, width, foreground in record.rows
    ]
    dtype = format.sample_dtype(max((len(row[0]) for row in rows), default=1))
    buffer = io.BytesIO()
    np.save(buffer, np.array(rows, dtype=dtype), allow_pickle=False)
    return buffer.getvalue()


def _csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue().encode()


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The work on one build, here or in parallel processes."""

    root: Path
    sources: list[Source]
    options: BuildOptions
    workers: int
    report: Report

    def duplicates(self, pairs: list[Pair]) -> list[Duplicate]:
        """The images that show the same thing; kept beside the plan for a build that is taken up again."""
        path = self.root / WORK / DUPLICATES
        if path.exists():
            return [Duplicate(*row) for row in json.loads(path.read_bytes())]
        hashes: list[bytes | None] = []
        with self._parallel(
            _hash, [pairs[i : i + HASHED] for i in range(0, len(pairs), HASHED)], "comparing", len(pairs)
        ) as parts:
            for part in parts:
                hashes += part
        whole = [pair for pair, value in zip(pairs, hashes, strict=True) if value]
        table = np.frombuffer(b"".join(value for value in hashes if value), np.uint8).reshape(-1, 32)
        near = [(whole[i], whole[j], distance) for i, j, distance in near_pairs(table)]
        with self._parallel(_kind, near, "comparing", len(near)) as kinds:
            found = [
                Duplicate(max(left.key, right.key), min(left.key, right.key), kind, distance)
                for (left, right, distance), kind in zip(near, kinds, strict=True)
            ]
        publish(self.root, path, format.canonical_json([astuple(duplicate) for duplicate in found]))
        return found

    def check(self, shards: list[PlannedShard]) -> list[Rejected]:
        """Find the bad pairs of all shards."""
        parts = _cut(shards)
        with self._parallel(_check, parts, "checking", sum(len(part.pairs) for part in parts)) as found:
            return [row for rows in found for row in rows]

    def pack(self, shards: list[PlannedShard]) -> list[ShardRecord]:
        """Pack the shards that are not packed yet; the records of all of them, in the plan's order."""
        records = {
            shard.name: ShardRecord.from_json(record_path(self.root, shard).read_bytes())
            for shard in shards
            if record_path(self.root, shard).exists()
        }
        missing = [shard for shard in shards if shard.name not in records]
        # The largest first, so that no process is left alone with a whole shard at the end.
        missing.sort(key=lambda shard: -len(shard.pairs))
        total = sum(len(shard.pairs) for shard in shards)
        done = total - sum(len(shard.pairs) for shard in missing)
        if len(missing) < 2 * self.workers:
            made = self._pack_parts(missing, total, done)
        else:
            made = self._pack_whole(missing, total, done)
        records.update((record.name, record) for record in made)
        return [records[shard.name] for shard in shards]

    def _pack_whole(self, shards: list[PlannedShard], total: int, done: int) -> list[ShardRecord]:
        """Each process encodes and writes shards of its own."""
        import webdataset.writer  # noqa: F401  once, before the fork: it costs each process more than a second

        with self._parallel(_pack, shards, "packing", total, done) as records:
            return list(records)

    def _pack_parts(self, shards: list[PlannedShard], total: int, done: int) -> list[ShardRecord]:
        """The processes encode parts of the shards, and this one writes them: for a set of few shards."""
        with self._parallel(_encode, _cut(shards), "packing", total, done) as parts:
            samples = (sample for part in parts for sample in part)
            return [write_shard(self.root, shard, itertools.islice(samples, len(shard.pairs))) for shard in shards]

    def _parallel(
        self, work: Work, parts: list[Any], title: str, total: int, before: int = 0
    ) -> AbstractContextManager[Iterator[Any]]:
        return in_parallel(
            work,
            parts,
            self,
            workers=min(self.workers, max(1, len(parts))),
            report=lambda done: self.report(before + done, total, title),
        )


def _cut(shards: list[PlannedShard]) -> list[PlannedShard]:
    """The shards in parts of a few samples each, in order."""
    return [
        replace(shard, pairs=shard.pairs[start : start + PART], groups=shard.groups[start : start + PART])
        for shard in shards
        for start in range(0, len(shard.pairs), PART)
    ]


def _hash(pairs: Sequence[Pair], run: _Run, tick: Callable[[], None]) -> list[bytes | None]:
    return hashes(pairs, run.sources, tick)


def _kind(near: tuple[Pair, Pair, int], run: _Run, tick: Callable[[], None]) -> str:
    kind = kind_of(near[0], near[1], run.sources)
    tick()
    return kind


def _check(part: PlannedShard, run: _Run, tick: Callable[[], None]) -> list[Rejected]:
    return check_shard(part, run.sources, run.options, tick)


def _encode(part: PlannedShard, run: _Run, tick: Callable[[], None]) -> list[Sample | list[Rejected]]:
    return list(encode_part(part, run.sources, run.options, tick))


def _pack(shard: PlannedShard, run: _Run, tick: Callable[[], None]) -> ShardRecord:
    return write_shard(run.root, shard, encode_part(shard, run.sources, run.options, tick))
