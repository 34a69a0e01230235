"""Write shards in two stages, so that each pair is decoded once: encode parts, then assemble shards from them.

The split of a pair depends on its duplicates, which are known when every image has been decoded. So the pairs are
encoded part by part, each part a tar in DIR/.build with a record next to it, and a shard is assembled by copying the
samples of the final plan. The parts follow the order of a plan without duplicates, which the final one mostly repeats:
a shard takes a few parts, and a part is deleted when its last shard is published.

A pair whose copy is deferred (`DeferredCopy`) has an entry in its part's record but no bytes in the tar; its shard
copies it from the source.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from operator import itemgetter
from typing import IO

from isal import isal_zlib

from shards import format, layout
from shards.errors import ToolkitError
from shards.format import ShardEntry
from shards.inputs.decode import BadPairError
from shards.inputs.match import Pair, Rejected
from shards.inputs.source import Source
from shards.parallel.processes import Advance
from shards.planning.plan import Part, PlannedShard
from shards.urls import without_password
from shards.writing.encode import DeferredCopy, Sample, copy_deferred, encode
from shards.writing.job import Job
from shards.writing.records import (
    PartRecord,
    SampleRow,
    ShardRecord,
    StagedSample,
    part_record_name,
    read_record,
    shard_record_name,
    tar_name,
    write_record,
)
from shards.writing.target import Target


def encode_part(part: Part, job: Job, advance: Advance) -> PartRecord:
    """Decode, check and encode the pairs of a part, and publish its tar, then its record, in DIR/.build.

    There is no tar when the copies of all its pairs are deferred.
    """
    samples: list[StagedSample] = []
    rejected: list[Rejected] = []
    offset = 0
    with ExitStack() as stack:
        tar: IO[bytes] | None = None
        for pair in part.pairs:
            encoded = encode(pair, job.sources, job.options, keep_original=part.keep_original)
            if isinstance(encoded, Sample):
                tar = tar or stack.enter_context(job.target.create(tar_name(part.name)))
                tar.writelines(layout.pieces(encoded.key, encoded.members))
                samples.append(_staged(encoded, offset))
                offset += layout.sample_bytes(samples[-1].sizes)
            elif isinstance(encoded, DeferredCopy):
                samples.append(_deferred(encoded))
            else:
                rejected += encoded
            advance()
    record = PartRecord(samples=samples, rejected=rejected)
    write_record(job.target, part_record_name(part.name), record.to_json())
    return record


def write_shard(item: tuple[PlannedShard, list[str]], job: Job, advance: Advance) -> None:
    """Assemble a shard from the parts that hold its pairs (the name of one for each), publish it, then its record.

    Raises ToolkitError when a file whose copy was deferred has changed, or a part is damaged.
    """
    shard, parts = item
    target, keep_original = job.target, job.options.keeps_original(shard.split)
    rows: list[SampleRow] = []
    flags: Counter[str] = Counter()
    offset = 0
    digest = hashlib.sha256()
    with target.create(shard.name) as file:
        staged = _staged_samples(target, shard, parts)
        for pair, part, (sample, tar) in zip(shard.pairs, parts, staged, strict=True):
            if tar and sample.offset is not None:
                sizes, crcs = sample.sizes, sample.crcs
                if not keep_original:  # it is the last member
                    sizes, crcs = [*sizes[: format.ORIGINAL], 0], [*crcs[: format.ORIGINAL], 0]
                tar.seek(sample.offset)
                members = _read_members(tar, sizes)
                if [isal_zlib.crc32(data) for data in members] != crcs:
                    raise _damaged_part(target, part, sample)
            else:
                members = _copy_members(pair, sample, job.sources, keep_original=keep_original)
                sizes, crcs = _sizes_and_crcs(members)
            for piece in layout.pieces(pair.key, members):
                file.write(piece)
                digest.update(piece)
            rows.append(SampleRow(sample.key, offset, sizes, crcs, *sample.original, sample.foreground))
            offset += layout.sample_bytes(sizes)
            flags.update(sample.flags)
            advance()
        end = bytes(layout.shard_bytes(offset) - offset)
        file.write(end)
        digest.update(end)
    entry = ShardEntry(name=shard.name, samples=len(rows), bytes=offset + len(end), sha256=digest.hexdigest())
    record = ShardRecord(entry=entry, rows=rows, flags=dict(flags))
    write_record(target, shard_record_name(shard), record.to_json())


def _read_members(tar: IO[bytes], sizes: list[int]) -> list[bytes]:
    """Read the members of a sample that begins here. Headers and paddings, which nothing protects, are made anew."""
    data = tar.read(layout.sample_bytes(sizes))
    return [data[start : start + size] for start, size in layout.member_spans(0, sizes)]


def _damaged_part(target: Target, part: str, sample: StagedSample) -> ToolkitError:
    """Delete a part that is not what was encoded, as when a disk has lost the end of its tar: it is encoded again."""
    target.delete([part_record_name(part), tar_name(part)])
    return ToolkitError(
        f"{target.location}: {tar_name(part)} is damaged ({sample.key} is not what was encoded); "
        "run the same build again, and check the disk"
    )


def _staged(sample: Sample, offset: int) -> StagedSample:
    sizes, crcs = _sizes_and_crcs(sample.members)
    return StagedSample(
        key=sample.key,
        offset=offset,
        sizes=sizes,
        crcs=crcs,
        original=sample.original,
        foreground=sample.foreground,
        has_lesion=sample.has_lesion,
        flags=sample.flags,
        hash=sample.hash.hex(),
        is_bytes_hash=sample.is_bytes_hash,
    )


def _deferred(copy: DeferredCopy) -> StagedSample:
    return StagedSample(
        key=copy.key,
        offset=None,
        sizes=[],
        crcs=copy.crcs,
        original=copy.original,
        foreground=format.UNCOUNTED,
        has_lesion=copy.has_lesion,
        flags=[format.COPIED],
        hash=copy.hash.hex(),
        is_bytes_hash=True,
    )


def _staged_samples(
    target: Target, shard: PlannedShard, parts: list[str]
) -> Iterator[tuple[StagedSample, IO[bytes] | None]]:
    """Yield the record of each sample of a shard, and the open tar of its part, where the part has one."""
    for part, run in itertools.groupby(zip(shard.pairs, parts, strict=True), key=itemgetter(1)):
        record = PartRecord.from_json(read_record(target, part_record_name(part)))
        samples = {sample.key: sample for sample in record.samples}
        has_tar = any(sample.offset is not None for sample in record.samples)
        with target.open(tar_name(part)) if has_tar else nullcontext() as tar:
            for pair, _ in run:
                yield samples[pair.key], tar


def _copy_members(pair: Pair, sample: StagedSample, sources: list[Source], *, keep_original: bool) -> list[bytes]:
    """Copy the members of a pair from its sources. Raises ToolkitError when its files have changed."""
    try:
        members = copy_deferred(pair, sample.original, sample.crcs, sources, keep_original=keep_original)
    except BadPairError:
        members = None
    if members is None:
        where = without_password(sources[pair.image.source].location)
        raise ToolkitError(
            f"{where}: {pair.image.name} or its mask has changed during the build or cannot be read any more; "
            "leave the sources as they are, and run again"
        )
    return members


def _sizes_and_crcs(members: list[bytes]) -> tuple[list[int], list[int]]:
    return [len(data) for data in members], [isal_zlib.crc32(data) for data in members]
