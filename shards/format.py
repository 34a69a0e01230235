"""The format of a shard set: the contract between the tool that writes it and everything that reads it.

On disk
    DIR/index.json            written last, by rename: once it exists, the set is complete
    DIR/samples-<split>.npy   the sample table of one split: a NumPy structured array (no pickle)
    DIR/rejected.csv          every rejected input: path, reason, detail
    DIR/duplicates.csv        pairs of images that show the same thing: see `shards.planning.duplicates`
    DIR/<split>/000000.tar    plain uncompressed USTAR, readable by webdataset.WebDataset

One sample is adjacent members of one tar with one key, in this order:
    KEY.jpg            the image, RGB JPEG
    KEY.json           UTF-8 JSON: key, height, width (of the original, upright), image and mask (names of the
                       sources), group, and fit (see `shards.geometry.ResizePlan`)
    KEY.mask.png       the mask at the image's size: 1-bit greyscale PNG, 1 where the lesion is
    KEY.original.png   the mask at its original resolution (val and test), 1-bit greyscale PNG

A sample whose flags contain `copied` (--size original) has the bytes of its source files: its masks may be 8-bit
greyscale PNG, with the lesion above 128.

A key is 1 to 80 letters, digits, "_" or "-": webdataset ends a key at its first dot. Member headers are 512 bytes
with mtime, uid and gid 0, empty user and group names and mode 0444, and bodies are padded to 512. The byte range of a
member follows from its sample's offset and the sizes of the members before it (`shards.layout`).

index.json (`Index`)
    format, version    "isicdist-shards", 1; a reader refuses any other
    digest             sha256 over the canonical JSON of all other fields: it identifies the whole set
    size               side of the square images in pixels, or null when each keeps its original size
    built              the options that decide the bytes (fit, split, seed, samples_per_shard, ...)
    counts             found = packed + rejected + ignored, in files; rejected files by reason; samples by flag;
                       pairs of duplicates by kind, and the number of them that lie in two splits
    splits             {name: {"samples": n, "table": {"name", "bytes", "sha256"},
                               "shards": [{"name", "samples", "bytes", "sha256"}, ...]}}

Compatibility: the version is raised only when a reader of the old version would go wrong. A field may be added under
the same version, so a reader ignores unknown fields, and works without those that are only informative (`built`, and
all but the first four of `counts`).

A row of the sample table (`sample_dtype`): key (ASCII), shard (position in the list of shards), offset (of the
sample's first header in the shard, in bytes), size[4] in bytes and crc[4] (CRC-32, of the members in the order above;
size 0 for an absent member), height and width of the original, foreground (mask pixels that are 1, or UNCOUNTED where
copied).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self, cast

import numpy as np

from shards.errors import CorruptShardError, ShardSetError

FORMAT = "isicdist-shards"
VERSION = 1
INDEX_NAME = "index.json"
REJECTED_NAME = "rejected.csv"
DUPLICATES_NAME = "duplicates.csv"

MEMBERS = ("jpg", "json", "mask.png", "original.png")
IMAGE, META, MASK, ORIGINAL = range(4)

MAX_SIZE = 8192  # pixels, of the side of a square image
UNCOUNTED = 2**32 - 1  # foreground of a mask that was copied
COPIED = "copied"  # flag of a sample that has the bytes of its source files
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,80}\Z")
_KEY_BYTES = np.array([byte == 0 or KEY_PATTERN.match(chr(byte)) is not None for byte in range(256)])
_TABLE_SHAPE = re.compile(rb"\{'descr':\[\('key','\|S(\d{1,2})'\),.*'shape':\((\d{1,12}),\),\}\Z")
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file of a set, such as a sample table: its name relative to the set, its length and its hash."""

    name: str
    bytes: int
    sha256: str

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Parse an entry of the index. Raises KeyError, TypeError or ValueError for a malformed one."""
        return cls(name=_text(value["name"]), bytes=_count(value["bytes"]), sha256=_text(value["sha256"]))

    def to_json(self) -> dict[str, Any]:
        """Give the entry as the index holds it."""
        return dict(vars(self))


@dataclass(frozen=True, kw_only=True)
class ShardEntry(FileEntry):
    """A shard of a set: a tar file and the number of its samples."""

    samples: int

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Parse an entry of the index. Raises KeyError, TypeError or ValueError for a malformed one."""
        return cls(
            name=_text(value["name"]),
            samples=_count(value["samples"]),
            bytes=_count(value["bytes"]),
            sha256=_text(value["sha256"]),
        )


@dataclass(frozen=True, kw_only=True)
class SplitEntry:
    """A split of a set: its sample table and its shards."""

    samples: int
    table: FileEntry
    shards: tuple[ShardEntry, ...]

    @classmethod
    def from_json(cls, name: str, value: Mapping[str, Any]) -> Self:
        """Parse the entry of the split `name`.

        Raises KeyError, TypeError or ValueError for a malformed one and for file names outside the split's own.
        """
        table = FileEntry.from_json(value["table"])
        shards = tuple(ShardEntry.from_json(shard) for shard in value["shards"])
        pattern = re.compile(rf"{re.escape(name)}/[0-9]{{6,}}\.tar")
        if not name.isidentifier() or table.name != table_name(name):
            raise ValueError(name)
        if not all(pattern.fullmatch(shard.name) for shard in shards):
            raise ValueError(name)
        return cls(samples=_count(value["samples"]), table=table, shards=shards)

    def to_json(self) -> dict[str, Any]:
        """Give the entry as the index holds it."""
        shards = [shard.to_json() for shard in self.shards]
        return {"samples": self.samples, "table": self.table.to_json(), "shards": shards}


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Numbers of input files and of samples: found = packed + rejected + ignored."""

    found: int
    packed: int
    rejected: int
    ignored: int
    reasons: Mapping[str, int] = field(default_factory=dict[str, int])
    """Rejected files by reason code."""
    flags: Mapping[str, int] = field(default_factory=dict[str, int])
    """Samples by flag."""
    duplicates: Mapping[str, int] | None = None
    """Pairs of duplicates by kind; None: built by a version that did not look for them."""
    duplicates_across_splits: int | None = None
    """Pairs of duplicates in two splits; None as above."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Parse the counts of an index. Raises KeyError, TypeError or ValueError for malformed ones."""
        return cls(
            found=_count(value["found"]),
            packed=_count(value["packed"]),
            rejected=_count(value["rejected"]),
            ignored=_count(value["ignored"]),
            reasons=_mapping(value.get("reasons", {})),
            flags=_mapping(value.get("flags", {})),
            duplicates=None if value.get("duplicates") is None else _mapping(value["duplicates"]),
            duplicates_across_splits=value.get("duplicates_across_splits"),
        )

    def to_json(self) -> dict[str, Any]:
        """Give the counts as the index holds them."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Index:
    """The index of a shard set: the typed content of index.json."""

    digest: str
    """sha256 that identifies the whole set."""
    size: int | None
    """Side of the square images in pixels; None when each keeps its original size."""
    built: Mapping[str, Any]
    """Build options and a digest of the inputs (`BuildOptions.to_json`); empty in a set of an older version."""
    counts: Counts
    splits: Mapping[str, SplitEntry]

    @classmethod
    def new(
        cls, *, size: int | None, built: Mapping[str, Any], counts: Counts, splits: Mapping[str, SplitEntry]
    ) -> Self:
        """Make the index of a set that has just been written, with its digest."""
        index = cls(digest="", size=size, built=built, counts=counts, splits=splits)
        return replace(index, digest=digest_of(index.to_json()))

    @classmethod
    def parse(cls, text: bytes, where: str) -> Self:
        """Parse and check the bytes of index.json; `where` is its path or URL for messages.

        The digest is checked over the JSON itself, so that fields of a later version count too. Raises ShardSetError
        for another format or version and for a missing or malformed field, CorruptShardError for a wrong digest.
        """
        try:
            value = parse_json(text)
            name, version = value["format"], value["version"]
        except (ValueError, KeyError, TypeError) as error:
            raise ShardSetError(f"{where}: not the index of a shard set; build it again") from error
        if name != FORMAT or version != VERSION:
            raise ShardSetError(
                f"{where}: format {name} version {version}, but this isicdist reads {FORMAT} version {VERSION}; "
                "build the set again with this version"
            )
        if value.get("digest") != digest_of(value):
            raise CorruptShardError(f"{where}: its content does not have its digest; copy or build the set again")
        try:
            return cls.from_json(value)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ShardSetError(
                f"{where}: its fields are not those of {FORMAT} version {VERSION}; build the set again"
            ) from error

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Build the index from parsed JSON; unknown fields are ignored.

        Raises KeyError, TypeError, AttributeError or ValueError when a field that a reader needs is missing or
        malformed, or when a file name points outside the set.
        """
        size = value["size"]
        if size is not None and not 1 <= _count(size) <= MAX_SIZE:
            raise ValueError(size)
        return cls(
            digest=_text(value["digest"]),
            size=size,
            built=_mapping(value.get("built", {})),
            counts=Counts.from_json(value["counts"]),
            splits={name: SplitEntry.from_json(name, split) for name, split in value["splits"].items()},
        )

    def to_json(self) -> dict[str, Any]:
        """Give the index as index.json holds it (`canonical_json` makes its bytes)."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "digest": self.digest,
            "size": self.size,
            "built": dict(self.built),
            "counts": self.counts.to_json(),
            "splits": {name: split.to_json() for name, split in self.splits.items()},
        }


def shard_name(split: str, position: int) -> str:
    """Give a shard's name relative to the set, as `train/000007.tar`."""
    return f"{split}/{position:06d}.tar"


def table_name(split: str) -> str:
    """Give the sample table's name relative to the set, as `samples-train.npy`."""
    return f"samples-{split}.npy"


def sample_dtype(key_bytes: int) -> np.dtype[np.void]:
    """Give the dtype of a sample table whose longest key has `key_bytes` bytes."""
    fields: list[Any] = [
        ("key", f"S{max(1, key_bytes)}"),
        ("shard", "<u4"),
        ("offset", "<u8"),
        ("size", "<u4", (4,)),
        ("crc", "<u4", (4,)),
        ("height", "<u4"),
        ("width", "<u4"),
        ("foreground", "<u4"),
    ]
    return np.dtype(fields)


def parse_table(data: bytes, shards: int) -> np.ndarray:
    """Parse a sample table, the bytes of an .npy file, of a split with `shards` shards.

    Its header is compared, not evaluated as numpy does, and nothing is allocated for what it promises. Raises
    ValueError for anything but such a table.
    """
    start = 10 + int.from_bytes(data[8:10], "little")
    header = data[10:start].replace(b" ", b"").rstrip(b"\n")  # numpy's versions fill it up differently
    shape = _TABLE_SHAPE.match(header)
    if data[:8] != b"\x93NUMPY\x01\x00" or shape is None:
        raise ValueError(f"no table of samples, but {data[:80]!r}")
    dtype, rows = sample_dtype(int(shape[1])), int(shape[2])
    if header != _table_header(dtype, rows) or len(data) != start + rows * dtype.itemsize:
        raise ValueError(f"{len(data)} bytes, {header.decode(errors='replace')}")
    table = np.frombuffer(data, dtype, offset=start)
    if len(table) and int(table["shard"].max()) >= shards:
        raise ValueError(f"shard {table['shard'].max()} of {shards}")
    letters = np.array(table["key"]).view(np.uint8).reshape(len(table), dtype["key"].itemsize)
    ends_early = (letters[:, :-1] == 0) & (letters[:, 1:] != 0)  # a key ends with the first 0
    if not _KEY_BYTES[letters].all() or not letters[:, 0].all() or ends_early.any():
        raise ValueError("a key with other characters than letters, digits, _ and -")
    return table


def _table_header(dtype: np.dtype[np.void], rows: int) -> bytes:
    """Give the header that `np.save` writes for a table, without the spaces."""
    header = str({"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows,)})
    return header.replace(" ", "").replace(",)}", ",),}").encode()


def parse_json(text: str | bytes) -> Any:
    """Parse JSON from strangers. Raises ValueError for what is none, also for text that is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error


def canonical_json(value: Any) -> bytes:
    """Serialise to canonical JSON: sorted keys, no spaces, UTF-8; undecodable bytes of a file name are escaped."""
    text = _CANONICAL.encode(value)
    return text.encode(errors="backslashreplace")  # as JSON escapes such a character


def digest_of(index: Mapping[str, Any]) -> str:
    """Compute a set's digest: sha256 over the canonical JSON of every field of its index but the digest."""
    return hashlib.sha256(canonical_json({k: v for k, v in index.items() if k != "digest"})).hexdigest()


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(value)
    return value


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(value)
    return cast("Mapping[str, Any]", value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value
