"""Build a shard set: find and pair, encode every pair in parallel processes, plan, write the shards, the index last.

A build that was killed is completed by running it again: DIR/.build holds what is done (`shards.writing.staging`).
"""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shards import format
from shards.errors import SourceError, UsageError
from shards.inputs.match import BadInputError, Pair, Pairing, Rejected, pair_files
from shards.inputs.source import find
from shards.parallel.dask import Cluster, connect
from shards.parallel.processes import Advance, Work, run_parallel
from shards.planning.duplicates import Duplicate, joined, kind_of, near_pairs
from shards.planning.plan import (
    BuildOptions,
    Part,
    PlannedShard,
    check_filled,
    check_groups,
    cut,
    digest_of_files,
    plan_shards,
    splits_by_hash,
)
from shards.planning.split import read_groups, read_split_file
from shards.writing.index import publish_index
from shards.writing.job import PLAN, Job
from shards.writing.staging import (
    PartRecord,
    ShardRecord,
    encode_part,
    part_record_name,
    shard_record_name,
    tar_name,
    write_shard,
)
from shards.writing.target import WORK, Target, open_target, publish, read

DUPLICATES = f"{WORK}/duplicates.json"
Report = Callable[[int, int, str], None]
"""Called now and then with the number of items done, of all items, and what is done to them."""


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """A complete shard set."""

    location: str
    """The path or URL where it lies."""
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
    scheduler: str | None = None,
    report: Report = lambda done, total, title: None,
) -> BuildResult:
    """Pack the pairs of two places (paths or URLs; they may be one) into a shard set at `out`, a path or URL.

    The bytes depend on inputs and options only. `scheduler` is the address of a Dask cluster (`shards.parallel`) that
    does the work in place of `workers` processes here. Raises SourceError, BadInputError when inputs are bad and
    `options.on_bad_input` is fail (then nothing is left behind), UsageError when `out` holds something else.
    """
    options = options or BuildOptions()
    if scheduler and workers is not None:
        raise UsageError("--workers and --scheduler: give one of the two; a cluster brings workers of its own")
    workers = _cores() if workers is None else workers
    if workers < 1:
        raise UsageError(f"--workers {workers}: give 1 or more")
    if scheduler:  # its workers have working directories of their own
        images, masks, out = (
            place if "://" in place else str(Path(place).absolute()) for place in (images, masks, str(out))
        )
    target = open_target(out)
    sources, files = find([images, masks])
    try:
        pairing = pair_files(files, options.mask_suffix)
        keys = [pair.key for pair in pairing.pairs]
        groups = read_groups(options.groups, keys) if options.groups else {}
        given = read_split_file(options.split_file, keys) if options.split_file else {}
        if given:
            check_groups(given, groups)
        built = {**options.to_json(), "inputs": digest_of_files(files, with_times=False)}
        if target.exists(format.INDEX_NAME):
            index = format.parse_index(read(target, format.INDEX_NAME), f"{target.location}/{format.INDEX_NAME}")
            _refuse_other(target, index["built"], built)
            target.clear(WORK)  # of a build that was killed just before its end
            return BuildResult(location=target.location, index=index, already=True)
        identity = {**built, "times": digest_of_files(files, with_times=True)}
        job = Job(target=target, sources=sources, options=options, identity=identity)
        with connect(scheduler) if scheduler else nullcontext() as cluster, _begun(target, identity):
            run = _Run(job=job, workers=workers, cluster=cluster, report=report)
            index = _build(run, pairing, groups, given, built)
    finally:
        for source in sources:
            source.close()
    target.clear(WORK)
    return BuildResult(location=target.location, index=index, already=False)


def _build(
    run: _Run, pairing: Pairing, groups: dict[str, str], given: dict[str, str], built: dict[str, Any]
) -> dict[str, Any]:
    """Encode the pairs, plan the shards by what that has found, put them together and publish the index."""
    options, fail = run.job.options, run.job.options.on_bad_input == "fail"
    keys = [pair.key for pair in pairing.pairs]
    first = given or splits_by_hash(keys, groups, {}, options)
    if not (fail and pairing.rejected):  # or what is bad is said before any word about splits
        check_filled(first, options, given)
    spool = run.encode(cut(plan_shards(pairing.pairs, first, groups, options), options, turn=0))
    bad = sorted(pairing.rejected + spool.rejected, key=lambda row: row.path)
    if bad and (fail or not spool.hashes):
        raise BadInputError(bad)

    good = [pair for pair in pairing.pairs if pair.key in spool.hashes]
    duplicates = run.duplicates(good, spool)
    if given:
        splits = {pair.key: given[pair.key] for pair in good}
    else:
        splits = splits_by_hash(spool.hashes, groups, joined(groups, duplicates), options)
    check_filled(splits, options, given)
    shards = plan_shards(good, splits, groups, options)
    # Duplicates take a few pairs to a split that keeps the original masks, which their first split does not.
    moved = [
        pair for pair in good if options.keeps_original(splits[pair.key]) > options.keeps_original(first[pair.key])
    ]
    again = run.encode(cut(plan_shards(moved, splits, groups, options), options, turn=1))
    records = run.write(shards, {**spool.part_of, **again.part_of})
    return publish_index(run.job.target, built, options, pairing, records, bad, duplicates, splits)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _refuse_other(target: Target, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise UsageError that says what differs, unless the two builds are the same."""
    names = [name for name in sorted(there.keys() | wanted.keys()) if there.get(name) != wanted.get(name)]
    if not names:
        return
    opaque = {"inputs": "the input files", "times": "the input files' times of change"}
    told = [opaque.get(name) or f"{name} ({there.get(name)} there, {wanted.get(name)} here)" for name in names]
    raise UsageError(
        f"{target.location}: holds another build; it differs in {', '.join(told)}; give another --out or remove it"
    )


@contextmanager
def _begun(target: Target, identity: dict[str, Any]) -> Iterator[None]:
    """Begin a build, or take up the one that was begun, and keep others out during the block.

    When the block finds that the sources cannot be used, what was made is taken away.
    """
    with target.taken():
        if target.exists(PLAN):
            _refuse_other(target, json.loads(read(target, PLAN)), identity)
        elif target.has_foreign_files():
            target.clear(WORK)
            raise UsageError(
                f"{target.location}: holds files that are no shard set; give a new or an empty folder for --out"
            )
        publish(target, PLAN, format.canonical_json(identity))
        try:
            yield
        except SourceError:
            target.clear()
            raise


@dataclass(frozen=True, kw_only=True)
class _Spool:
    """What the encoded parts hold."""

    part_of: dict[str, str]
    """The part of each pair, by key."""
    hashes: dict[str, bytes]
    """The hash of the image of each good pair, by key."""
    copied: set[str]
    """The keys of the good pairs whose bytes are copied, which is what their hashes are of."""
    rejected: list[Rejected]


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The work on one build, in parallel processes here or on a cluster."""

    job: Job
    workers: int
    cluster: Cluster | None
    report: Report

    def encode(self, parts: list[Part]) -> _Spool:
        """Encode the parts that are not encoded yet; what all of them hold."""
        there, missing = self._done(parts, lambda part: part_record_name(part.name))
        total = sum(len(part.pairs) for part in parts)
        spool = _Spool(
            part_of={pair.key: part.name for part in parts for pair in part.pairs}, hashes={}, copied=set(), rejected=[]
        )
        done = total - sum(len(part.pairs) for part in missing)
        with self._parallel(_encode, missing, "packing", total, done) as made:
            before = (PartRecord.from_json(read(self.job.target, part_record_name(part.name))) for part in there)
            for record in itertools.chain(made, before):
                spool.hashes.update((sample.key, bytes.fromhex(sample.hash)) for sample in record.samples)
                spool.copied.update(sample.key for sample in record.samples if format.COPIED in sample.flags)
                spool.rejected.extend(record.rejected)
        return spool

    def duplicates(self, pairs: list[Pair], spool: _Spool) -> list[Duplicate]:
        """The images that show the same thing; kept beside the plan for a build that is taken up again."""
        if self.job.target.exists(DUPLICATES):
            return [Duplicate(*row) for row in json.loads(read(self.job.target, DUPLICATES))]
        table = np.frombuffer(b"".join(spool.hashes[pair.key] for pair in pairs), np.uint8).reshape(-1, 32)
        near = [
            _Near(pairs[i], pairs[j], distance, pairs[i].key in spool.copied) for i, j, distance in near_pairs(table)
        ]
        with self._parallel(_kind, near, "comparing", len(near)) as kinds:
            found = [
                Duplicate(max(left.key, right.key), min(left.key, right.key), kind, distance)
                for (left, right, distance, _), kind in zip(near, kinds, strict=True)
                if kind
            ]
        publish(self.job.target, DUPLICATES, format.canonical_json([astuple(duplicate) for duplicate in found]))
        return found

    def write(self, shards: list[PlannedShard], part_of: Mapping[str, str]) -> list[ShardRecord]:
        """Write the shards that are not there yet; the records of all of them, in the plan's order.

        A part is deleted when the last shard that needs it is published, so that the disk holds little twice.
        """
        work = [(shard, [part_of[pair.key] for pair in shard.pairs]) for shard in shards]
        _, missing = self._done(work, lambda item: shard_record_name(item[0]))
        needed = Counter(part for _, parts in missing for part in set(parts))
        self.job.target.delete(tar_name(part) for part in set(part_of.values()) - needed.keys())
        total = sum(len(shard.pairs) for shard in shards)
        done = total - sum(len(shard.pairs) for shard, _ in missing)
        with self._parallel(_write, missing, "writing", total, done) as written:
            for _, (_, parts) in zip(written, missing, strict=True):
                needed.subtract(set(parts))
                self.job.target.delete(tar_name(part) for part in set(parts) if not needed[part])
        return [ShardRecord.from_json(read(self.job.target, shard_record_name(shard))) for shard in shards]

    def _done(self, items: list[Any], record_name: Callable[[Any], str]) -> tuple[list[Any], list[Any]]:
        """The items that a build before this one has done, and the others."""
        names = {f"{WORK}/{name}" for name in self.job.target.work()}
        done = [item for item in items if record_name(item) in names]
        return done, [item for item in items if record_name(item) not in names]

    def _parallel(
        self, work: Work, parts: list[Any], title: str, total: int, before: int = 0
    ) -> AbstractContextManager[Iterator[Any]]:
        def report(done: int) -> None:
            self.report(before + done, total, title)

        if self.cluster is not None:
            return nullcontext(self.cluster.map_ordered(work, parts, self.job, report))
        return run_parallel(work, parts, self.job, workers=min(self.workers, max(1, len(parts))), report=report)


def _encode(part: Part, job: Job, advance: Advance) -> PartRecord:
    return encode_part(job.target, part, job.sources, job.options, advance)


class _Near(NamedTuple):
    """Two images whose hashes are near."""

    left: Pair
    right: Pair
    distance: int
    copied: bool
    """Whether the hashes are of bytes."""


def _kind(near: _Near, job: Job, advance: Advance) -> str | None:
    kind = kind_of(near.left, near.right, job.sources, copied=near.copied)
    advance()
    return kind


def _write(item: tuple[PlannedShard, list[str]], job: Job, advance: Advance) -> None:
    shard, parts = item
    write_shard(job.target, shard, parts, job.sources, job.options)
    for _ in shard.pairs:
        advance()
