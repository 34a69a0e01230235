"""The format of a shard set: THE contract between the tool that writes it and everything that reads it.

On disk
    DIR/index.json            written last, by rename: where it is, the set is complete
    DIR/samples-<split>.npy   the sample table of one split: a NumPy structured array (no pickle)
    DIR/rejected.csv          every input left out: path, reason, detail
    DIR/duplicates.csv        images that show the same thing, by twos: see `shards.planning.duplicates`
    DIR/<split>/000000.tar    plain uncompressed USTAR, readable by webdataset.WebDataset as it stands

One sample is adjacent members of one tar with one key, in this order:
    KEY.jpg            the image, RGB JPEG
    KEY.json           UTF-8 JSON: key, height, width (of the original, upright), image and mask (names of the
                       sources), group, and fit (see `shards.geometry.ResizePlan`)
    KEY.mask.png       the mask at the image's size: 1-bit greyscale PNG, 1 where the lesion is
    KEY.original.png   the mask at its original resolution (val and test), 1-bit greyscale PNG

A sample whose flags have `copied` (--size original) has the source's bytes, which nobody has decoded: its masks may be
8-bit greyscale PNG, with the lesion above 128.

A key is 1 to 80 letters, digits, "_" or "-": a dot would end it early in webdataset. Member headers are 512
bytes with mtime, uid and gid 0, empty user and group names and mode 0444, and bodies are padded to 512. So a
member's bytes are found from its sample's offset and the sizes of the members before it (`shards.layout`).

index.json
    format, version    "isicdist-shards", 1; a reader refuses any other
    digest             sha256 over the canonical JSON of all other fields: it names the whole set
    size               side of the square images in pixels, or null when each keeps its original size
    built              the options that decide the bytes (fit, split, seed, samples_per_shard, ...)
    counts             found = packed + rejected + ignored, in files; rejected files by reason; samples by flag;
                       pairs of duplicates by what is the same, and how many of them a given split has torn apart
    splits             {name: {"samples": n, "table": {"name", "bytes", "sha256"},
                               "shards": [{"name", "samples", "bytes", "sha256"}, ...]}}

The version is raised when a reader of the old one would go wrong, and at no other time: a field may be added under
the same version. So a reader takes no notice of a field it does not know, and does without one that only informs
(`built`, and all but the first four of `counts`).

A row of the sample table (`sample_dtype`): key (ASCII), shard (its place in the list of shards), offset (of the
sample's first header in the shard), size[4] and crc[4] (CRC-32, of the members in the order above; size 0 where
there is none), height and width of the original, foreground (mask pixels that are 1, or UNCOUNTED where copied).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from shards.errors import CorruptShardError, ShardSetError

FORMAT = "isicdist-shards"
VERSION = 1
INDEX_NAME = "index.json"
REJECTED_NAME = "rejected.csv"
DUPLICATES_NAME = "duplicates.csv"

MEMBERS = ("jpg", "json", "mask.png", "original.png")
IMAGE, META, MASK, ORIGINAL = range(4)

UNCOUNTED = 2**32 - 1  # foreground of a mask that nobody has decoded
COPIED = "copied"  # flag of a sample that has the source's bytes
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,80}\Z")
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def shard_name(split: str, number: int) -> str:
    """The shard's name relative to the set, as `train/000007.tar`."""
    return f"{split}/{number:06d}.tar"


def table_name(split: str) -> str:
    """The sample table's name relative to the set, as `samples-train.npy`."""
    return f"samples-{split}.npy"


def sample_dtype(key_bytes: int) -> np.dtype:
    """The dtype of a sample table whose longest key has `key_bytes` bytes."""
    fields = [
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


def canonical_json(value: Any) -> bytes:
    """One spelling of a JSON value: sorted keys, no spaces, UTF-8; a file's name that is no UTF-8 is escaped."""
    text = _CANONICAL.encode(value)
    return text.encode(errors="backslashreplace")  # which is how JSON escapes such a character, too


def digest_of(index: Mapping[str, Any]) -> str:
    """The set's digest: sha256 over the canonical JSON of every field of its index but the digest."""
    return hashlib.sha256(canonical_json({k: v for k, v in index.items() if k != "digest"})).hexdigest()


def parse_index(text: bytes, where: str) -> dict[str, Any]:
    """Parse and check an index; `where` names it in messages.

    Raises ShardSetError for another format or version and for a field that is missing or not what it should be,
    CorruptShardError when the digest does not fit.
    """
    try:
        index = json.loads(text)
        name, version = index["format"], index["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ShardSetError(f"{where}: not the index of a shard set; build it again") from error
    if name != FORMAT or version != VERSION:
        raise ShardSetError(
            f"{where}: format {name} version {version}, but this isicdist reads {FORMAT} version {VERSION}; "
            "build the set again with this version"
        )
    if index.get("digest") != digest_of(index):
        raise CorruptShardError(f"{where}: its content does not have its digest; copy or build the set again")
    try:
        right = _is_as_specified(index)
    except (KeyError, TypeError, AttributeError):
        right = False
    if not right:
        raise ShardSetError(f"{where}: its fields are not those of {FORMAT} version {VERSION}; build the set again")
    return index


def _is_as_specified(index: Mapping[str, Any]) -> bool:
    """Whether an index has what a reader needs, and names no file outside the set."""
    counts, size = index["counts"], index["size"]
    numbers = [counts[name] for name in ("found", "packed", "rejected", "ignored")]
    named = size is None or (isinstance(size, int) and size > 0)
    for split, entry in index["splits"].items():
        table, shards = entry["table"], entry["shards"]
        numbers += [entry["samples"], table["bytes"]]
        numbers += [shard[name] for shard in shards for name in ("samples", "bytes")]
        named &= split.isidentifier() and table["name"] == table_name(split)
        named &= all(re.fullmatch(rf"{split}/[0-9]{{6,}}\.tar", shard["name"]) for shard in shards)
        named &= all(isinstance(file["sha256"], str) for file in [table, *shards])
    return bool(named) and all(isinstance(number, int) and number >= 0 for number in numbers)
