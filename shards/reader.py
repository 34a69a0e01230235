"""Open a shard set and read any sample of it by its number, with every byte checked against the index."""

from __future__ import annotations

import hashlib
import io
import json
import mmap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from shards import format
from shards.errors import CorruptShardError, ShardSetError, UsageError


@dataclass(frozen=True)
class Split:
    """One split of an open shard set: samples numbered from 0 in the order of its table."""

    root: Path
    name: str
    digest: str
    """The digest of the whole set."""
    table: np.ndarray = field(repr=False)
    shards: tuple[str, ...] = field(repr=False)
    size: int | None
    """Side of the images in pixels; None when each keeps its own."""
    _maps: dict[int, mmap.mmap] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def shard_samples(self) -> np.ndarray:
        """The number of samples in each shard, int64: what the epoch's order is made from."""
        return np.bincount(self.table["shard"], minlength=len(self.shards)).astype(np.int64)

    def key(self, number: int) -> str:
        """The key of a sample."""
        return self.table["key"][number].decode()

    def read(self, number: int, member: int) -> memoryview:
        """The bytes of one member (`format.IMAGE`, ...) of a sample; empty where the sample has none.

        Raises CorruptShardError that names shard and key when a byte is not what the index says.
        """
        row = self.table[number]
        shard = int(row["shard"])
        start, size = format.member_spans(int(row["offset"]), row["size"].tolist())[member]
        if not size:
            return memoryview(b"")
        data = memoryview(self._open(shard))[start : start + size]
        format.checked(data, int(row["crc"][member]), self.shards[shard], self.key(number), member)
        return data

    def image(self, number: int) -> np.ndarray:
        """The image (H, W, 3) uint8 RGB."""
        return self._decode(number, format.IMAGE)

    def mask(self, number: int) -> np.ndarray:
        """The mask (H, W) uint8, 1 where the lesion is."""
        return self._decode(number, format.MASK)

    def original_mask(self, number: int) -> np.ndarray | None:
        """The mask at its original resolution (H, W) uint8, or None where the set does not carry it."""
        return self._decode(number, format.ORIGINAL) if self.table["size"][number, format.ORIGINAL] else None

    def meta(self, number: int) -> dict[str, Any]:
        """The sample's JSON."""
        return json.loads(bytes(self.read(number, format.META)))

    def _decode(self, number: int, member: int) -> np.ndarray:
        data = self.read(number, member)
        decode = format.decode_image if member == format.IMAGE else format.decode_mask
        try:
            return decode(data)
        except (ValueError, OSError) as error:
            shard = self.shards[self.table["shard"][number]]
            name = f"{self.key(number)}.{format.MEMBERS[member]}"
            raise CorruptShardError(f"{shard}: {name} does not decode ({error})") from error

    def _open(self, shard: int) -> mmap.mmap:
        # Two threads may both map a shard for the first time: one of the two maps is dropped unused.
        if shard not in self._maps:
            path = self.root / self.shards[shard]
            try:
                with path.open("rb") as file:
                    self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (FileNotFoundError, ValueError) as error:
                raise CorruptShardError(f"{path}: the shard is missing or empty; copy it again") from error
        return self._maps[shard]


@dataclass(frozen=True)
class ShardSet:
    """An open shard set: its index and its splits."""

    root: Path
    index: dict[str, Any] = field(repr=False)

    @classmethod
    def open(cls, root: str | Path) -> Self:
        """Open the set at `root`. Raises ShardSetError when there is none, or of another version."""
        root = Path(root)
        path = root / format.INDEX_NAME
        if not path.is_file():
            what = "there is no such folder" if not root.is_dir() else "no complete shard set (no index.json)"
            raise ShardSetError(f"{root}: {what}; make one with: isic-shards build --out {root} ...")
        return cls(root, format.parse_index(path.read_bytes(), str(path)))

    @property
    def digest(self) -> str:
        """sha256 that names the whole set."""
        return self.index["digest"]

    @property
    def size(self) -> int | None:
        """Side of the square images in pixels; None when each keeps its original size."""
        return self.index["size"]

    def split(self, name: str) -> Split:
        """One split, its table checked. Raises UsageError for a name the set does not have."""
        splits = self.index["splits"]
        if name not in splits:
            raise UsageError(f"{self.root}: no split {name!r}; it has {', '.join(sorted(splits))}")
        entry = splits[name]
        path = self.root / entry["table"]["name"]
        if not path.is_file():
            raise ShardSetError(f"{path}: the sample table is missing; copy or build the set again")
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != entry["table"]["sha256"]:
            raise CorruptShardError(f"{path}: not the bytes that the index names; copy or build the set again")
        table = np.load(io.BytesIO(data), allow_pickle=False)
        shards = tuple(shard["name"] for shard in entry["shards"])
        return Split(self.root, name, self.digest, table, shards, self.size)
