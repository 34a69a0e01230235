"""Check every byte of a shard set against its index, and with `deep` decode every sample."""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from shards import codecs, format, layout
from shards.errors import CorruptShardError
from shards.reader import ShardSet, Split

CHUNK = 1 << 20  # bytes that are hashed at a time


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What a check found."""

    shards: int
    samples: int
    bytes: int
    faults: list[str]
    """One line each, with shard and key; empty when every byte is right."""


def verify(
    root: str | Path, *, deep: bool = False, report: Callable[[int, int], None] = lambda done, total: None
) -> Verified:
    """Check a set; of a remote one the copies on this node, fetched where there are none.

    `report` is called with the shards done and all shards.

    Hashing and decoding release the interpreter's lock, so threads use every core. Raises ShardSetError when
    there is no set, CorruptShardError when its index or a sample table is damaged.
    """
    shard_set = ShardSet.open(root)
    splits = [shard_set.split(name) for name in shard_set.index["splits"]]
    work = [
        (split, number, entry)
        for split in splits
        for number, entry in enumerate(shard_set.index["splits"][split.name]["shards"])
    ]
    faults: list[str] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, found in enumerate(pool.map(lambda item: _verify_shard(*item, deep=deep), work), start=1):
            faults += found
            report(done, len(work))
    return Verified(
        shards=len(work),
        samples=sum(len(split) for split in splits),
        bytes=sum(entry["bytes"] for *_, entry in work),
        faults=faults,
    )


def _verify_shard(split: Split, number: int, entry: dict, *, deep: bool) -> list[str]:
    """The faults of one shard."""
    path = split.root / entry["name"]
    samples = [int(i) for i in (split.table["shard"] == number).nonzero()[0]]
    if len(samples) != entry["samples"]:
        return [f"{entry['name']}: the index says {entry['samples']} samples, the table {len(samples)}"]
    if split.copies:
        try:
            split.file(number).close()  # so that there is a copy
        except CorruptShardError as error:
            return [str(error)]
    if not path.is_file():
        return [f"{entry['name']}: the shard is missing"]
    size = path.stat().st_size
    faults = []
    if size != entry["bytes"]:
        faults.append(f"{entry['name']}: {size} bytes, not the {entry['bytes']} of the index")
    if not size:
        return faults
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as data,
    ):
        whole = _sha256(data) == entry["sha256"]
        members = [fault for sample in samples for fault in _verify_members(split, sample, entry["name"], data)]
    faults += members
    if not whole and not faults:
        faults.append(f"{entry['name']}: not the sha256 of the index, though every member is right")
    if deep and not members:
        faults += [fault for sample in samples for fault in _decode(split, sample, entry["name"])]
    return faults


def _sha256(data: memoryview) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(data), CHUNK):
        digest.update(data[start : start + CHUNK])
    return digest.hexdigest()


def _verify_members(split: Split, sample: int, shard: str, data: memoryview) -> list[str]:
    """Check the header's name and the CRC-32 of each member of a sample."""
    row, key = split.table[sample], split.key(sample)
    spans = layout.member_spans(int(row["offset"]), row["size"].tolist())
    faults = []
    for member, (start, size) in enumerate(spans):
        name = f"{key}.{format.MEMBERS[member]}"
        if not size:
            continue
        if start + size > len(data):
            faults.append(f"{shard}: {name} is cut off")
        elif bytes(data[start - layout.BLOCK : start]).split(b"\0", 1)[0] != name.encode():
            faults.append(f"{shard}: {name} is not where the index says")
        elif zlib.crc32(data[start : start + size]) != row["crc"][member]:
            faults.append(f"{shard}: {name} is corrupt")
    return faults


def _is_black(split: Split, sample: int) -> bool:
    """Whether a mask without foreground, which may have been copied from anywhere, is 0 throughout."""
    with Image.open(io.BytesIO(split.read(sample, format.MASK)), formats=["PNG"]) as picture:
        return picture.getextrema() == (0, 0)


def _decode(split: Split, sample: int, shard: str) -> list[str]:
    """Decode all of a sample, and compare what it says of itself with what it is."""
    row, key = split.table[sample], split.key(sample)
    try:
        image, mask, original = split.image(sample), split.mask(sample), split.original_mask(sample)
        meta = split.meta(sample)
        described = (meta["key"], meta["height"], meta["width"])
    except CorruptShardError as error:
        return [str(error)]
    except (ValueError, KeyError, TypeError) as error:
        return [f"{shard}: {key}.json is not a sample's JSON ({error!r})"]
    size = (int(row["height"]), int(row["width"]))
    checks = {
        "the image and the mask differ in size": image.shape[:2] == mask.shape,
        "its size is not the set's": split.size is None or mask.shape == (split.size, split.size),
        "its foreground is not the table's": row["foreground"] in (int(mask.sum()), format.UNCOUNTED),
        "its JSON is another sample's": described == (key, *size),
        "its original mask has another size": original is None or original.shape == size,
        f"its mask has values, but none above {codecs.FOREGROUND}": mask.any() or _is_black(split, sample),
    }
    return [f"{shard}: {key}: {what}" for what, right in checks.items() if not right]
