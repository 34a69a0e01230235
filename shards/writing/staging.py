"""From pairs to shards in two steps, so that each pair is decoded once: encode parts, then put shards together.

Which split a pair is in depends on its duplicates, and they are known when every image has been decoded. So the
pairs are encoded part by part, each part a tar in the folder of work with a record beside it, and a shard is made by
copying the samples of the final plan. The parts follow the order of a plan that knows no duplicates, which the final
one mostly repeats: a shard takes a few parts, and a part is deleted when its last shard is published.

A pair whose bytes are copied, from a folder, leaves in its part's record only what was found out about it, and its
shard takes it from the folder.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from operator import itemgetter
from typing import IO, Any, Self

from isal import isal_zlib

from shards import format, layout
from shards.errors import ToolkitError
from shards.inputs.decode import BadPairError
from shards.inputs.match import Pair, Rejected
from shards.inputs.source import Source
from shards.layout import pieces
from shards.parallel.processes import Advance
from shards.planning.plan import BuildOptions, Part, PlannedShard
from shards.writing.encode import Left, Sample, copy_deferred, encode
from shards.writing.target import WORK, Target, publish, read


@dataclass(frozen=True, kw_only=True)
class StagedSample:
    """A sample that lies in a part."""

    key: str
    offset: int | None
    """Of its first header in the part's tar, in bytes; None where it is left in the sources."""
    sizes: list[int]
    crcs: list[int]
    """Of its members, as in the sample table; none where it is left in the sources."""
    original: list[int]
    """Height and width of the original in pixels."""
    foreground: int
    """Mask pixels that are 1, or `format.UNCOUNTED`."""
    flags: list[str]
    hash: str
    """Of the image, in hexadecimal digits."""


@dataclass(frozen=True, kw_only=True)
class PartRecord:
    """What an encoded part holds."""

    samples: list[StagedSample]
    rejected: list[Rejected]

    def to_json(self) -> bytes:
        """As the bytes of its file."""
        return format.canonical_json(
            {"samples": [vars(sample) for sample in self.samples], "rejected": [asdict(row) for row in self.rejected]}
        )

    @classmethod
    def from_json(cls, text: bytes) -> Self:
        """The record that `to_json` wrote."""
        value = json.loads(text)
        samples = [StagedSample(**row) for row in value["samples"]]
        return cls(samples=samples, rejected=[Rejected(**row) for row in value["rejected"]])


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """What a published shard holds: enough for the index, without opening the shard again."""

    name: str
    samples: int
    bytes: int
    sha256: str
    rows: list[list[Any]]
    """Per sample: key, offset, sizes, crcs, height, width, foreground (as in the sample table)."""
    flags: dict[str, int]
    """How many samples carry which flag."""

    def to_json(self) -> bytes:
        """As the bytes of its file."""
        return format.canonical_json(vars(self))

    @classmethod
    def from_json(cls, text: bytes) -> Self:
        """The record that `to_json` wrote."""
        return cls(**json.loads(text))


def tar_name(part: str) -> str:
    """The name of an encoded part."""
    return f"{WORK}/{part}.tar"


def part_record_name(part: str) -> str:
    """The name of the record of an encoded part; it is written after the part."""
    return f"{WORK}/{part}.json"


def shard_record_name(shard: PlannedShard) -> str:
    """The name of the record of a published shard, there while the set is built."""
    return f"{WORK}/{shard.split}-{shard.number:06d}.json"


def encode_part(target: Target, part: Part, sources: list[Source], options: BuildOptions, advance: Advance) -> PartRecord:
    """Decode, check and encode the pairs of a part, and leave its tar and its record in the folder of work.

    There is no tar where all of its pairs are left in the sources.
    """
    samples: list[StagedSample] = []
    rejected: list[Rejected] = []
    offset = 0
    with ExitStack() as tar:
        file: IO[bytes] | None = None
        for pair, group in zip(part.pairs, part.groups, strict=True):
            made = encode(pair, group, sources, options, original=part.original)
            if isinstance(made, Sample):
                file = file or tar.enter_context(target.writing(tar_name(part.name)))
                file.writelines(pieces(made.key, made.members))
                samples.append(_spooled(made, offset))
                offset += layout.sample_bytes(samples[-1].sizes)
            elif isinstance(made, Left):
                samples.append(_left(made))
            else:
                rejected += made
            advance()
    record = PartRecord(samples=samples, rejected=rejected)
    publish(target, part_record_name(part.name), record.to_json())
    return record


def _spooled(sample: Sample, offset: int) -> StagedSample:
    sizes, crcs = _sizes_and_crcs(sample.members)
    return StagedSample(
        key=sample.key,
        offset=offset,
        sizes=sizes,
        crcs=crcs,
        original=list(sample.original),
        foreground=sample.foreground,
        flags=sample.flags,
        hash=sample.hash.hex(),
    )


def _left(pair: Left) -> StagedSample:
    return StagedSample(
        key=pair.key,
        offset=None,
        sizes=[],
        crcs=[],
        original=list(pair.original),
        foreground=format.UNCOUNTED,
        flags=[format.COPIED],
        hash=pair.hash.hex(),
    )


def write_shard(
    target: Target, shard: PlannedShard, parts: list[str], sources: list[Source], options: BuildOptions
) -> ShardRecord:
    """Put a shard together from the parts that hold its pairs (one name for each) and publish it, then its record."""
    original = options.keeps_original(shard.split)
    rows: list[list[Any]] = []
    flags: Counter[str] = Counter()
    offset = 0
    digest = hashlib.sha256()
    with target.writing(shard.name) as file:
        spooled = _spooled_samples(target, shard, parts)
        for pair, group, (sample, tar) in zip(shard.pairs, shard.groups, spooled, strict=True):
            if tar and sample.offset is not None:
                sizes, crcs = sample.sizes, sample.crcs
                if not original:  # it is the last member
                    sizes, crcs = [*sizes[: format.ORIGINAL], 0], [*crcs[: format.ORIGINAL], 0]
                tar.seek(sample.offset)
                data = [tar.read(layout.sample_bytes(sizes))]
            else:
                members = _copied(pair, group, sample, sources, original=original)
                sizes, crcs = _sizes_and_crcs(members)
                data = pieces(pair.key, members)
            for piece in data:
                file.write(piece)
                digest.update(piece)
            rows.append([sample.key, offset, sizes, crcs, *sample.original, sample.foreground])
            offset += layout.sample_bytes(sizes)
            flags.update(sample.flags)
        end = bytes(layout.shard_bytes(offset) - offset)
        file.write(end)
        digest.update(end)
    record = ShardRecord(
        name=shard.name,
        samples=len(rows),
        bytes=offset + len(end),
        sha256=digest.hexdigest(),
        rows=rows,
        flags=dict(flags),
    )
    publish(target, shard_record_name(shard), record.to_json())
    return record


def _copied(pair: Pair, group: str, left: StagedSample, sources: list[Source], *, original: bool) -> list[bytes]:
    """The members of a pair that was left in its sources. Raises ToolkitError when it is not what it was."""
    height, width = left.original
    try:
        members = copy_deferred(pair, group, (height, width), sources, original=original)
    except BadPairError:
        members = None
    if members is None:
        raise ToolkitError(
            f"{sources[pair.image.source].location}: {pair.image.name} or its mask has changed during the build or cannot "
            "be read any more; leave the sources as they are, and run again"
        )
    return members


def _sizes_and_crcs(members: list[bytes]) -> tuple[list[int], list[int]]:
    return [len(data) for data in members], [isal_zlib.crc32(data) for data in members]


def _spooled_samples(
    target: Target, shard: PlannedShard, parts: list[str]
) -> Iterator[tuple[StagedSample, IO[bytes] | None]]:
    """What is known of each pair of a shard, and its part's tar, where it lies in one."""
    for part, run in itertools.groupby(zip(shard.pairs, parts, strict=True), key=itemgetter(1)):
        record = PartRecord.from_json(read(target, part_record_name(part)))
        samples = {sample.key: sample for sample in record.samples}
        lying = any(sample.offset is not None for sample in record.samples)
        with target.open(tar_name(part)) if lying else nullcontext() as tar:
            for pair, _ in run:
                yield samples[pair.key], tar
