"""Records of a build, of its encoded parts and of its published shards: files in DIR/.build that let it resume.

Each is JSON, after a line with the CRC-32 of the JSON.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

from isal import isal_zlib

from shards import format
from shards.errors import ToolkitError
from shards.format import ShardEntry
from shards.inputs.match import Rejected
from shards.planning.plan import PlannedShard
from shards.writing.target import WORK, Target, read_bytes, write_bytes

RECORDS_VERSION = 7
"""A build that another version of the records has begun cannot be resumed."""


@dataclass(frozen=True, kw_only=True)
class StagedSample:
    """A sample of an encoded part, or one whose copy from the sources is deferred."""

    key: str
    offset: int | None
    """Offset in bytes of its first header in the part's tar; None when its copy is deferred."""
    sizes: list[int]
    """Sizes in bytes of the members, as in the sample table; empty when the copy is deferred."""
    crcs: list[int]
    """CRC-32 of the members, as in the sample table; of image and mask when the copy is deferred."""
    original: tuple[int, int]
    """Height and width of the original in pixels."""
    foreground: int
    """Number of mask pixels that are 1, or `format.UNCOUNTED`."""
    has_lesion: bool
    """The mask is not empty."""
    flags: list[str]
    hash: str
    """Hash of the image, in hexadecimal digits."""
    is_bytes_hash: bool
    """The hash is that of the image's bytes (`shards.planning.duplicates.bytes_hash`)."""


@dataclass(frozen=True, kw_only=True)
class PartRecord:
    """Content of an encoded part."""

    samples: list[StagedSample]
    rejected: list[Rejected]

    def to_json(self) -> dict[str, Any]:
        """Give plain values for the record's file."""
        return {
            "samples": [vars(sample) for sample in self.samples],
            "rejected": [asdict(row) for row in self.rejected],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Restore what `to_json` gave."""
        samples = [StagedSample(original=tuple(row.pop("original")), **row) for row in value["samples"]]
        return cls(samples=samples, rejected=[Rejected(**row) for row in value["rejected"]])


class SampleRow(NamedTuple):
    """A row of the sample table (`format.sample_dtype`), but for the index of the shard."""

    key: str
    offset: int
    """Offset in bytes of its first header in the shard."""
    sizes: list[int]
    """Sizes in bytes of the members, in the order of `format.MEMBERS`."""
    crcs: list[int]
    """CRC-32 of the members."""
    height: int
    """Height of the original in pixels."""
    width: int
    """Width of the original in pixels."""
    foreground: int
    """Number of mask pixels that are 1, or `format.UNCOUNTED`."""


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """Content of a published shard: enough for the index, without opening the shard again."""

    entry: ShardEntry
    """Entry of the shard in the index."""
    rows: list[SampleRow]
    """One row for each sample, in the shard's order."""
    flags: dict[str, int]
    """Number of samples by flag."""

    def to_json(self) -> dict[str, Any]:
        """Give plain values for the record's file."""
        return {"entry": self.entry.to_json(), "rows": self.rows, "flags": self.flags}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Restore what `to_json` gave."""
        rows = [SampleRow(*row) for row in value["rows"]]
        return cls(entry=ShardEntry.from_json(value["entry"]), rows=rows, flags=value["flags"])


def write_record(target: Target, name: str, value: Any) -> None:
    """Write plain values as a record, atomically."""
    text = format.canonical_json(value)
    write_bytes(target, name, b"%08x\n%s" % (isal_zlib.crc32(text), text))


def read_record(target: Target, name: str) -> Any:
    """Read the values of a record. Raises ToolkitError when it is damaged."""
    checksum, _, text = read_bytes(target, name).partition(b"\n")
    if checksum != b"%08x" % isal_zlib.crc32(text):
        raise ToolkitError(
            f"{target.location}: {name} is damaged or of another version; "
            f"remove {target.location}, check the disk, and run the same build again"
        )
    return json.loads(text)


def tar_name(part: str) -> str:
    """Name of the tar of an encoded part."""
    return f"{WORK}/{part}.tar"


def part_record_name(part: str) -> str:
    """Name of the record of an encoded part; it is written after the part."""
    return f"{WORK}/{part}.json"


def shard_record_name(shard: PlannedShard) -> str:
    """Name of the record of a published shard; it is written after the shard."""
    return f"{WORK}/{shard.split}-{shard.number:06d}.json"
