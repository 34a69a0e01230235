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

A sample whose flags have `copied` (--size original) has the source's bytes, which nobody has decoded: its masks may be
8-bit greyscale PNG, with the lesion above 128.

A key is 1 to 80 letters, digits, "_" or "-": a dot would end it early in webdataset. Member headers are 512
bytes with mtime, uid and gid 0, empty user and group names and mode 0444, and bodies are padded to 512. So a
member's bytes are found from its sample's offset and the sizes of the members before it (`member_spans`).

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
import io
import json
import re
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import simplejpeg
from isal import isal_zlib

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
UNCOUNTED = 2**32 - 1  # foreground of a mask that nobody has decoded
COPIED = "copied"  # flag of a sample that has the source's bytes
JPEG_QUALITY = 95
MAX_PIXELS = 100_000_000  # of one image: a decompression bomb is bigger
PNG_START = b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDR"  # then width, height, kind and CRC-32
PNG_KIND = bytes((1, 0, 0, 0, 0))  # 1 bit, grey; deflate, filters by row, not interlaced
PNG_BODY = 41  # bytes before the body of IDAT, where nothing but IHDR comes before it

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


def decode_image(data: bytes | memoryview, out: np.ndarray | None = None) -> np.ndarray:
    """The image (H, W, 3) uint8 RGB of a JPEG that `encode_image` wrote or the archives hold.

    `out`: decode into this contiguous array instead of a new one. Raises ValueError when the bytes are no JPEG, or one
    of another size than `out` or of more than MAX_PIXELS.
    """
    if out is None:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        _check_pixels(int(height), int(width))
    return _of_shape(simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=out), out)


def encode_mask(mask: np.ndarray) -> bytes:
    """1-bit greyscale PNG of a mask (H, W), non-zero where the lesion is.

    Its rows are not filtered, as the PNG specification recommends for such images: smaller than what Pillow's filters
    make of a mask, written in 0.4 of the time and read in 0.3 (`decode_mask`).
    """
    height, width = mask.shape
    rows = np.insert(np.packbits(mask.astype(bool), axis=1), 0, 0, axis=1)  # a row begins with its filter's number
    header = PNG_START[-4:] + struct.pack(">II", width, height) + PNG_KIND
    chunks = (header, b"IDAT" + zlib.compress(rows.tobytes(), 6), b"IEND")
    return PNG_START[:8] + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


def decode_mask(data: bytes | memoryview, out: np.ndarray | None = None) -> np.ndarray:
    """The mask (H, W) uint8, 1 where the lesion is, of a 1-bit or 8-bit PNG; into `out` where one is given.

    Raises OSError or ValueError for anything else, for a size that is not that of `out`, and for more than MAX_PIXELS.
    What `encode_mask` did not write is left to Pillow. The checksums of PNG's chunks are not looked at: those of the
    index are.
    """
    mask = _plain_mask(data)
    if mask is None:
        from PIL import Image  # late: a loader of what is built here does without its memory

        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            if picture.mode not in ("1", "L"):
                raise ValueError(f"a mask of mode {picture.mode}, not 1-bit or 8-bit grey")
            mask = np.array(picture, dtype=np.uint8)
            if picture.mode == "L":
                mask = (mask > FOREGROUND).view(np.uint8)
    if out is None:
        return mask
    out[:] = _of_shape(mask, out)
    return out


def _plain_mask(data: bytes | memoryview) -> np.ndarray | None:
    """The mask (H, W) in a PNG laid out as `encode_mask` does it; None for every other one."""
    if len(data) < PNG_BODY or data[:16] != PNG_START:
        return None
    width, height = struct.unpack(">II", data[16:24])
    _check_pixels(height, width)
    end = PNG_BODY + int.from_bytes(data[33:37], "big")
    if data[24:29] != PNG_KIND or data[37:PNG_BODY] != b"IDAT" or data[end + 8 : end + 12] != b"IEND":
        return None
    row = 1 + -(-width // 8)
    inflate = isal_zlib.decompressobj()
    try:
        rows = np.frombuffer(inflate.decompress(data[PNG_BODY:end], height * row + 1), np.uint8)
    except isal_zlib.error:  # pyright: ignore[reportGeneralTypeIssues]  its stub has an instance
        return None
    if len(rows) != height * row or not inflate.eof or rows[::row].any():
        return None
    return np.unpackbits(rows.reshape(height, row)[:, 1:], axis=1, count=width)


def _check_pixels(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise ValueError(f"{width} × {height} pixels, more than {MAX_PIXELS}")


def _of_shape(image: np.ndarray, out: np.ndarray | None) -> np.ndarray:
    if out is not None and image.shape != out.shape:
        raise ValueError(f"{image.shape[1]} × {image.shape[0]} pixels, not {out.shape[1]} × {out.shape[0]}")
    return image


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


def checked(data: bytes | memoryview, crc: int, shard: str, key: str, member: int) -> bytes | memoryview:
    """`data`, when its CRC-32 is `crc`. Raises CorruptShardError that names shard, key and member."""
    if isal_zlib.crc32(data) != crc:
        raise CorruptShardError(
            f"{shard}: {key}.{MEMBERS[member]} is corrupt (its CRC-32 is not the index's); "
            "copy the shard again or rebuild the set"
        )
    return data
