"""Run the parallel stages of a build: encode the parts, compare near duplicates, write the shards.

Each stage leaves out what its records in DIR/.build say is done, and so resumes where a killed build stopped.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from shards.errors import ToolkitError
from shards.inputs.match import Pair, Rejected
from shards.parallel.dask import Cluster
from shards.parallel.processes import Advance, Work, run_parallel
from shards.planning.duplicates import HASH_BYTES, Duplicate, kind_of, near_pairs
from shards.planning.plan import Part, PlannedShard
from shards.progress import Report
from shards.writing.job import Job
from shards.writing.records import (
    PartRecord,
    ShardRecord,
    part_record_name,
    read_record,
    shard_record_name,
    tar_name,
    write_record,
)
from shards.writing.staging import encode_part, write_shard
from shards.writing.target import WORK

DUPLICATES = f"{WORK}/duplicates.json"

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Outcome of the encoding of some parts."""

    part_of: dict[str, str]
    """Name of the part of each pair, by key."""
    hashes: dict[str, bytes]
    """Hash of the image of each good pair, by key."""
    copied: set[str]
    """Keys of the good pairs that are copied as they are: their hashes are those of bytes."""
    with_lesion: set[str]
    """Keys of the good pairs whose mask is not empty."""
    rejected: list[Rejected]


class _NearPair(NamedTuple):
    """Two pairs whose images have near hashes."""

    first: Pair
    second: Pair
    distance: int
    """Number of bits in which the hashes differ."""
    copied: bool
    """The hashes are those of bytes (`bytes_hash`)."""


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The parallel stages of one build, each of which resumes where a killed build stopped."""

    job: Job
    workers: int
    cluster: Cluster | None
    report: Report

    def encode(self, parts: list[Part]) -> Encoded:
        """Encode the parts that are not encoded yet; the outcome of all of them."""
        finished, remaining = self._by_record(parts, lambda part: part_record_name(part.name))
        total = sum(len(part.pairs) for part in parts)
        done = total - sum(len(part.pairs) for part in remaining)
        part_of = {pair.key: part.name for part in parts for pair in part.pairs}
        encoded = Encoded(part_of=part_of, hashes={}, copied=set(), with_lesion=set(), rejected=[])
        with self._map(encode_part, remaining, "packing", total, done) as new_records:
            names = (part_record_name(part.name) for part in finished)
            old_records = (PartRecord.from_json(read_record(self.job.target, name)) for name in names)
            for record in itertools.chain(new_records, old_records):
                encoded.hashes.update((sample.key, bytes.fromhex(sample.hash)) for sample in record.samples)
                encoded.copied.update(sample.key for sample in record.samples if sample.is_bytes_hash)
                encoded.with_lesion.update(sample.key for sample in record.samples if sample.has_lesion)
                encoded.rejected.extend(record.rejected)
        return encoded

    def encode_again(self, parts: list[Part]) -> dict[str, str]:
        """Encode parts of pairs that were good before; the name of the part of each pair, by key.

        Raises ToolkitError when one of them is bad now; its part is deleted, so that the next run reads it again.
        """
        encoded = self.encode(parts)
        if encoded.rejected:
            self._delete_bad_parts(encoded)
            first = next(row for row in encoded.rejected if row.reason != "partner")
            raise ToolkitError(
                f"{first.path}: it was good when it was read before, and is {first.reason} now ({first.detail}); "
                "check its disk, leave the sources as they are, and run the same build again"
            )
        return encoded.part_of

    def find_duplicates(self, pairs: list[Pair], encoded: Encoded) -> list[Duplicate]:
        """Find the images that show the same thing, or read the list that a killed build has written.

        Raises ToolkitError when that was of other pairs: a part was damaged, and an image of it is bad now.
        """
        target = self.job.target
        keys = hashlib.sha256("\n".join(pair.key for pair in pairs).encode()).hexdigest()
        if target.exists(DUPLICATES):
            record = read_record(target, DUPLICATES)
            if record["keys"] != keys:
                self._delete_bad_parts(encoded)
                raise ToolkitError(
                    f"{target.location}: a pair that was good when it was read before is bad now, or the other way "
                    f"round; check its disk and run the same build again, if need be after removing {target.location}"
                )
            return [Duplicate(*row) for row in record["duplicates"]]
        hashes = np.frombuffer(b"".join(encoded.hashes[pair.key] for pair in pairs), np.uint8).reshape(-1, HASH_BYTES)
        near = [
            _NearPair(pairs[i], pairs[j], distance, copied)
            for i, j, distance in near_pairs(hashes)
            for copied in [pairs[i].key in encoded.copied]
            if not (copied and distance)
        ]
        with self._map(_compare, near, "comparing", len(near)) as results:
            duplicates = [duplicate for duplicate in results if duplicate]
        write_record(target, DUPLICATES, {"keys": keys, "duplicates": [astuple(each) for each in duplicates]})
        return duplicates

    def write_shards(self, shards: list[PlannedShard], part_of: Mapping[str, str]) -> list[ShardRecord]:
        """Write the shards that are not written yet; the records of all of them, in the plan's order.

        A part is deleted when the last shard that needs it is published, so that little is on the disk twice.
        """
        items = [(shard, [part_of[pair.key] for pair in shard.pairs]) for shard in shards]
        _, remaining = self._by_record(items, lambda item: shard_record_name(item[0]))
        shards_of_part = Counter(part for _, parts in remaining for part in set(parts))
        self.job.target.delete(tar_name(part) for part in set(part_of.values()) - shards_of_part.keys())
        total = sum(len(shard.pairs) for shard in shards)
        done = total - sum(len(shard.pairs) for shard, _ in remaining)
        with self._map(write_shard, remaining, "writing", total, done) as written:
            for _, (_, parts) in zip(written, remaining, strict=True):
                shards_of_part.subtract(set(parts))
                self.job.target.delete(tar_name(part) for part in set(parts) if not shards_of_part[part])
        names = (shard_record_name(shard) for shard in shards)
        return [ShardRecord.from_json(read_record(self.job.target, name)) for name in names]

    def _delete_bad_parts(self, encoded: Encoded) -> None:
        """Delete the parts with a bad pair, so that the next run encodes them again."""
        bad = {part for key, part in encoded.part_of.items() if key not in encoded.hashes}
        self.job.target.delete(name for part in bad for name in (part_record_name(part), tar_name(part)))

    def _by_record(self, items: list[Item], record_name: Callable[[Item], str]) -> tuple[list[Item], list[Item]]:
        """Divide items into those whose record is in the work folder, and the others."""
        names = {f"{WORK}/{name}" for name in self.job.target.work_files()}
        finished = [item for item in items if record_name(item) in names]
        return finished, [item for item in items if record_name(item) not in names]

    def _map(
        self, work: Work[Item, Job, Result], items: list[Item], stage: str, total: int, done_before: int = 0
    ) -> AbstractContextManager[Iterator[Result]]:
        """Map `work` over the items, in order, in processes here or on the cluster, with progress reports."""

        def report(done: int) -> None:
            self.report(done_before + done, total, stage)

        if self.cluster is not None:
            return nullcontext(self.cluster.map_ordered(work, items, self.job, report))
        return run_parallel(work, items, self.job, workers=min(self.workers, max(1, len(items))), report=report)


def _compare(near: _NearPair, job: Job, advance: Advance) -> Duplicate | None:
    """Compare two images with near hashes; None when they are no duplicates."""
    kind = kind_of(near.first, near.second, job.sources, copied=near.copied)
    advance()
    if kind is None:
        return None
    smaller, greater = sorted((near.first.key, near.second.key))
    return Duplicate(greater, smaller, kind, near.distance)
