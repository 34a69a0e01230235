"""Pack one shard: decode, fit and encode its samples, write the tar, publish it and its record by rename."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, Self, cast

from shards import format
from shards.pair import BadPairError, load
from shards.plan import BuildOptions, PlannedShard
from shards.source import Pair, Rejected, Source

WORK = ".build"
"""Folder in the set for what is not finished: temporary files and records; gone when the set is complete."""

Tick = Callable[[], None]
"""Called after each pair."""


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """What a packed shard holds: enough for the index, without opening the shard again."""

    name: str
    samples: int
    bytes: int
    sha256: str
    rows: list[list[Any]]
    """Per sample: key, offset, sizes, crcs, height, width, foreground (as in the sample table)."""
    rejected: list[Rejected]
    flags: dict[str, int]
    """How many samples carry which flag."""

    def to_json(self) -> bytes:
        """As the bytes of its file."""
        return format.canonical_json(asdict(self))

    @classmethod
    def from_json(cls, text: bytes) -> Self:
        """The record that `to_json` wrote."""
        value = json.loads(text)
        value["rejected"] = [Rejected(**row) for row in value["rejected"]]
        return cls(**value)


def record_path(root: Path, shard: PlannedShard) -> Path:
    """Where the record of a packed shard is kept while the set is built."""
    return root / WORK / f"{shard.split}-{shard.number:06d}.json"


def publish(root: Path, path: Path, data: bytes) -> None:
    """Write a whole file under its final name: temporary name, fsync, rename."""
    part = root / WORK / f"{path.name}.{os.getpid()}.part"
    with part.open("wb") as file:
        file.write(data)
        _settle(file, part, path)


def check_shard(shard: PlannedShard, sources: list[Source], options: BuildOptions, tick: Tick) -> list[Rejected]:
    """Decode and check the pairs of a shard without packing them."""
    rejected: list[Rejected] = []
    for pair in shard.pairs:
        try:
            load(pair, sources, options.fit, options.size)
        except BadPairError as error:
            rejected += error.rejected(pair)
        tick()
    return rejected


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample as it goes into a shard."""

    key: str
    members: list[bytes]
    """As in `format.MEMBERS`; an absent one is empty."""
    original: tuple[int, int]
    """Height and width of the original in pixels."""
    foreground: int
    """Mask pixels that are 1."""
    flags: list[str]


def encode(
    pair: Pair, group: str, sources: list[Source], options: BuildOptions, *, original: bool
) -> Sample | list[Rejected]:
    """Decode, fit and encode a pair, with its mask at the original resolution where asked; or say what is bad."""
    try:
        decoded = load(pair, sources, options.fit, options.size)
    except BadPairError as error:
        return error.rejected(pair)
    fit = decoded.fit
    mask = fit.mask(decoded.mask)
    copied = decoded.jpeg if fit.kind == "original" else None
    meta = {
        "key": pair.key,
        "height": fit.original[0],
        "width": fit.original[1],
        "image": pair.image.name,
        "mask": pair.mask.name,
        "group": group,
        "fit": fit.to_json(),
        "flags": decoded.flags,
    }
    members = [
        copied or format.encode_image(fit.image(decoded.picture)),
        format.canonical_json(meta),
        format.encode_mask(mask),
        format.encode_mask(decoded.mask) if original else b"",
    ]
    return Sample(key=pair.key, members=members, original=fit.original, foreground=int(mask.sum()), flags=decoded.flags)


def encode_part(shard: PlannedShard, sources: list[Source], options: BuildOptions, tick: Tick) -> Iterator[Any]:
    """`encode` for each pair of a shard, or of a part of one."""
    original = options.keeps_original(shard.split)
    for pair, group in zip(shard.pairs, shard.groups, strict=True):
        yield encode(pair, group, sources, options, original=original)
        tick()


def write_shard(root: Path, shard: PlannedShard, samples: Iterable[Sample | list[Rejected]]) -> ShardRecord:
    """Write a shard and publish it, then its record. A shard none of whose pairs is good is not written."""
    from webdataset.writer import TarWriter  # imports torch

    part = root / WORK / f"{shard.split}-{shard.number:06d}.tar.{os.getpid()}.part"
    rows: list[list[Any]] = []
    rejected: list[Rejected] = []
    flags: Counter[str] = Counter()
    offset = 0
    with part.open("wb") as file:
        stream = _HashingFile(file)
        with TarWriter(
            cast(BinaryIO, stream), user="", group="", mode=0o444, mtime=0, compress=False, encoder=False
        ) as tar:
            for sample in samples:
                if isinstance(sample, list):
                    rejected += sample
                    continue
                named = {format.MEMBERS[i]: data for i, data in enumerate(sample.members) if data}
                tar.write({"__key__": sample.key, **named})
                sizes = [len(data) for data in sample.members]
                crcs = [zlib.crc32(data) for data in sample.members]
                rows.append([sample.key, offset, sizes, crcs, *sample.original, sample.foreground])
                offset += format.sample_bytes(sizes)
                flags.update(sample.flags)
        if rows:
            (root / shard.split).mkdir(exist_ok=True)
            _settle(file, part, root / shard.name)
    part.unlink(missing_ok=True)
    record = ShardRecord(
        name=shard.name,
        samples=len(rows),
        bytes=stream.length,
        sha256=stream.digest.hexdigest(),
        rows=rows,
        rejected=rejected,
        flags=dict(flags),
    )
    publish(root, record_path(root, shard), record.to_json())
    return record


class _HashingFile:
    """Passes writes on to a file, and knows their number of bytes and sha256."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.length = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.length += len(data)
        return self._file.write(data)


def _settle(file: IO[bytes], part: Path, path: Path) -> None:
    """Bring a written file to the disk, then to its final name."""
    file.flush()
    os.fsync(file.fileno())
    part.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # or the name could be lost in a power cut
    finally:
        os.close(folder)
