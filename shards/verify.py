"""Check every byte of a shard set against its index; with `deep`, decode every sample too."""

from __future__ import annotations

import hashlib
import io
import mmap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from isal import isal_zlib
from PIL import Image

from shards import codecs, format, layout
from shards.errors import CorruptShardError
from shards.parallel.processes import available_cores
from shards.progress import Report, no_report
from shards.reader import ShardSet, Split


@dataclass(frozen=True, kw_only=True)
class Verified:
    """Result of a check."""

    shards: int
    samples: int
    bytes: int
    faults: list[str]
    """One line each, with shard and key; empty for a sound set."""


def verify(root: str | Path, *, deep: bool = False, report: Report = no_report) -> Verified:
    """Check the set in a folder or at a URL; a remote one is downloaded into the node's cache.

    `report` is called with the shards done and the total. Hashing and decoding release the GIL, so the work runs on
    one thread per core. Raises ShardSetError when there is no set, CorruptShardError when its index or a sample table
    is damaged.
    """
    shard_set = ShardSet.open(root)
    splits = [shard_set.split(name) for name in shard_set.index.splits]
    work = [(split, shard) for split in splits for shard in range(len(split.entries))]
    faults: list[str] = []

    def verify_shard(item: tuple[Split, int]) -> list[str]:
        return _verify_shard(*item, deep=deep)

    with ThreadPoolExecutor(available_cores()) as pool:
        for done, found in enumerate(pool.map(verify_shard, work), start=1):
            faults += found
            report(done, len(work))
    return Verified(
        shards=len(work),
        samples=sum(len(split) for split in splits),
        bytes=sum(entry.bytes for split in splits for entry in split.entries),
        faults=faults,
    )


def _verify_shard(split: Split, shard: int, *, deep: bool) -> list[str]:
    """Find the faults of one shard, given by its position in `split.entries`."""
    entry = split.entries[shard]
    path = split.root / entry.name
    indices = [int(i) for i in (split.table["shard"] == shard).nonzero()[0]]
    if len(indices) != entry.samples:
        return [f"{entry.name}: the index says {entry.samples} samples, the table {len(indices)}"]
    if split.cached_set:
        try:
            split.open_shard(shard).close()  # downloads it
        except CorruptShardError as error:
            return [str(error)]
    if not path.is_file():
        return [f"{entry.name}: the shard is missing"]
    size = path.stat().st_size
    faults: list[str] = []
    if size != entry.bytes:
        faults.append(f"{entry.name}: {size} bytes, not the {entry.bytes} of the index")
    if not size:
        return faults
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as data,
    ):
        hash_fits = hashlib.sha256(data).hexdigest() == entry.sha256
        member_faults = [fault for index in indices for fault in _verify_members(split, index, entry.name, data)]
    faults += member_faults
    if not hash_fits and not faults:
        faults.append(f"{entry.name}: not the sha256 of the index, though every member is right")
    if deep and not member_faults:
        faults += [fault for index in indices for fault in _verify_decoded(split, index, entry.name)]
    return faults


def _verify_members(split: Split, index: int, shard: str, data: memoryview) -> list[str]:
    """Check the name in the tar header and the CRC-32 of each member of a sample."""
    row, key = split.table[index], split.key(index)
    spans = layout.member_spans(int(row["offset"]), row["size"].tolist())
    faults: list[str] = []
    for member, (start, size) in enumerate(spans):
        name = f"{key}.{format.MEMBERS[member]}"
        if not size:
            continue
        if start + size > len(data):
            faults.append(f"{shard}: {name} is cut off")
        elif bytes(data[start - layout.BLOCK : start]).split(b"\0", 1)[0] != name.encode():
            faults.append(f"{shard}: {name} is not where the index says")
        elif isal_zlib.crc32(data[start : start + size]) != row["crc"][member]:
            faults.append(f"{shard}: {name} is corrupt")
    return faults


def _verify_decoded(split: Split, index: int, shard: str) -> list[str]:
    """Decode a sample, and compare its sizes, foreground and JSON with the table."""
    row, key = split.table[index], split.key(index)
    try:
        image, mask, original = split.image(index), split.mask(index), split.original_mask(index)
        meta = split.meta(index)
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
        f"its mask has values, but none above {codecs.FOREGROUND}": mask.any() or _is_all_zero(split, index),
    }
    return [f"{shard}: {key}: {fault}" for fault, passed in checks.items() if not passed]


def _is_all_zero(split: Split, index: int) -> bool:
    """True if every value of a mask's PNG is 0: a copied 8-bit mask may mark the lesion by other values than 255."""
    with Image.open(io.BytesIO(split.read(index, format.MASK)), formats=["PNG"]) as picture:
        return picture.getextrema() == (0, 0)
