"""The format of a shard set: THE contract between the tool that writes it and everything that reads it.

On disk
    DIR/index.json            written last, by rename: where it is, the set is complete
    DIR/samples-<split>.npy   the sample table of one split: a NumPy structured array (no pickle)
    DIR/rejected.csv          every input left out: path, reason, detail
    DIR/duplicates.csv        images that show the same thing, by twos: see `shards.duplicates`
    DIR/<split>/000000.tar    plain uncompressed USTAR, readable by webdataset.WebDataset as it stands

One sample is adjacent members of one tar with one key, in this order:
    KEY.jpg            the image, RGB JPEG
    KEY.json           UTF-8 JSON: key, height, width (of the original, upright), image and mask (names of the
                       sources), group, and fit (see `shards.geometry.Fit`)
    KEY.mask.png       the mask at the image's size: 1-bit greyscale PNG, 1 where the lesion is
    KEY.original.png   the mask at its original resolution (val and test), 1-bit greyscale PNG

A key is 1 to 80 letters, digits, "_" or "-": a dot would end it early in webdataset. Member headers are 512
bytes with mtime, uid and gid 0, empty user and group names and mode 0444, and bodies are padded to 512. So a
member's bytes are found from its sample's offset and the sizes of the members before it (`member_spans`).

index.json
    format, version    "isicdist-shards", 1; a reader refuses any other
    digest             sha256 over the canonical JSON of all other fields: it names the whole set
    size               side of the square images in pixels, or null when each keeps its original size
    built              the options that decide the bytes (fit, split, seed, samples_per_shard, ...)
    counts             found = packed + rejected + ignored, in files; samples by flag; pairs of duplicates by what
                       is the same, and how many of them a given split has torn apart
    splits             {name: {"samples": n, "table": {"name", "bytes", "sha256"},
                               "shards": [{"name", "samples", "bytes", "sha256"}, ...]}}

A row of the sample table (`sample_dtype`): key (ASCII), shard (its place in the list of shards), offset (of the
sample's first header in the shard), size[4] and crc[4] (CRC-32, of the members in the order above; size 0 where
there is none), height and width of the original, foreground (mask pixels that are 1).
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from shards.errors import CorruptShardError, ShardSetError

FORMAT = "isicdist-shards"
VERSION = 1
INDEX_NAME = "index.json"
REJECTED_NAME = "rejected.csv"
DUPLICATES_NAME = "duplicates.csv"

MEMBERS = ("jpg", "json", "mask.png", "original.png")
IMAGE, META, MASK, ORIGINAL = range(4)

BLOCK = 512  # bytes: a tar header, and what bodies are padded to
SHARD_END = 10240  # bytes: a tar is padded to a multiple of its record
FOREGROUND = 128  # a mask value above it is lesion, as the official scorer has it
JPEG_QUALITY = 95
MAX_PIXELS = 100_000_000  # of one image: a decompression bomb is bigger

KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,80}\Z")


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


def padded(size: int) -> int:
    """The bytes that a member's body of `size` bytes takes in a tar."""
    return -(-size // BLOCK) * BLOCK


def sample_bytes(sizes: list[int]) -> int:
    """The bytes that a sample takes in a tar, headers and padding included. An absent member has size 0."""
    return sum(BLOCK + padded(size) for size in sizes if size)


def shard_bytes(content: int) -> int:
    """The length of a tar whose samples take `content` bytes: two empty blocks, then up to a full record."""
    return -(-(content + 2 * BLOCK) // SHARD_END) * SHARD_END


def member_spans(offset: int, sizes: list[int]) -> list[tuple[int, int]]:
    """(first byte, length) in the shard of each member's body, for a sample that begins at `offset`."""
    spans = []
    for size in sizes:
        spans.append((offset + BLOCK, size))
        offset += BLOCK + padded(size) if size else 0
    return spans


def encode_image(image: np.ndarray) -> bytes:
    """JPEG of an image (H, W, 3) uint8 RGB."""
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(image), quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling="420"
    )


def decode_image(data: bytes | memoryview) -> np.ndarray:
    """The image (H, W, 3) uint8 RGB of a JPEG that `encode_image` wrote or the archives hold.

    Raises ValueError when the bytes are no JPEG.
    """
    return simplejpeg.decode_jpeg(data, colorspace="RGB")


def encode_mask(mask: np.ndarray) -> bytes:
    """1-bit greyscale PNG of a mask (H, W), non-zero where the lesion is."""
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(bool)).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def decode_mask(data: bytes | memoryview) -> np.ndarray:
    """The mask (H, W) uint8, 1 where the lesion is, of a 1-bit PNG. Raises OSError or ValueError otherwise."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
        if picture.mode != "1":
            raise ValueError(f"a mask of mode {picture.mode}, not 1-bit")
        return np.array(picture, dtype=np.uint8)


def canonical_json(value: Any) -> bytes:
    """One spelling of a JSON value: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest_of(index: Mapping[str, Any]) -> str:
    """The set's digest: sha256 over the canonical JSON of every field of its index but the digest."""
    return hashlib.sha256(canonical_json({k: v for k, v in index.items() if k != "digest"})).hexdigest()


def parse_index(text: bytes, where: str) -> dict[str, Any]:
    """Parse and check an index; `where` names it in messages.

    Raises ShardSetError for another format or version, CorruptShardError when the digest does not fit.
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
    return index


def checked(data: bytes | memoryview, crc: int, shard: str, key: str, member: int) -> bytes | memoryview:
    """`data`, when its CRC-32 is `crc`. Raises CorruptShardError that names shard, key and member."""
    if zlib.crc32(data) != crc:
        raise CorruptShardError(
            f"{shard}: {key}.{MEMBERS[member]} is corrupt (its CRC-32 is not the index's); "
            "copy the shard again or rebuild the set"
        )
    return data
