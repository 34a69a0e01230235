"""Open a shard set and read any sample of it by its number, with every byte checked against the index.

A local set is read where it lies. Of a remote one whole shards are downloaded into the node's cache (`shards.remote`).
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import numpy as np
from isal import isal_zlib

from shards import codecs, format, layout
from shards.errors import CorruptShardError, ShardSetError, UsageError

if TYPE_CHECKING:
    from shards.remote.cache import Copies, NodeCache

REMOTE_WINDOW = 16
"""Shards of a remote set that are shuffled together unless told otherwise: all of them must be here at once."""


@dataclass(frozen=True)
class Split:
    """One split of an open shard set: samples numbered from 0 in the order of its table."""

    root: Path
    """The folder of the set; of a remote one, of its copies on this node."""
    name: str
    digest: str
    """The digest of the whole set."""
    table: np.ndarray = field(repr=False)
    entries: tuple[dict[str, Any], ...] = field(repr=False)
    """The shards as the index has them: name, samples, bytes, sha256."""
    size: int | None
    """Side of the images in pixels; None when each keeps its own."""
    copies: Copies | None = field(default=None, repr=False, compare=False)
    """Of a remote set, its copies on this node."""
    _maps: dict[int, mmap.mmap] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def location(self) -> str:
        """The folder or URL of the set, for messages."""
        return self.copies.remote.location if self.copies else str(self.root)

    @cached_property
    def shards(self) -> tuple[str, ...]:
        """The names of the shards."""
        return tuple(entry["name"] for entry in self.entries)

    @property
    def window(self) -> int | None:
        """How many shards are shuffled together unless told otherwise: None, which is all, where they are local."""
        return REMOTE_WINDOW if self.copies and len(self.entries) > REMOTE_WINDOW else None

    @property
    def shard_samples(self) -> np.ndarray:
        """The number of samples in each shard, int64: what the epoch's order is made from."""
        return np.bincount(self.table["shard"], minlength=len(self.entries)).astype(np.int64)

    def key(self, number: int) -> str:
        """The key of a sample."""
        return self.table["key"][number].decode()

    def read(self, number: int, member: int) -> memoryview:
        """The bytes of one member (`format.IMAGE`, ...) of a sample; empty where the sample has none.

        Raises CorruptShardError that names shard and key when a byte is not what the index says.
        """
        shard = int(self.table["shard"][number])
        if not self.table["size"][number, member]:
            return memoryview(b"")
        try:
            return self._member(self._open(shard), number, member)
        except CorruptShardError:
            if self.copies:  # or the next run would read this copy, too
                self.copies.drop(self.entries[shard])
            raise

    def image(self, number: int, out: np.ndarray | None = None) -> np.ndarray:
        """The image (H, W, 3) uint8 RGB; decoded into `out`, a contiguous array of that shape, where one is given."""
        return self._decode(number, format.IMAGE, out)

    def mask(self, number: int, out: np.ndarray | None = None) -> np.ndarray:
        """The mask (H, W) uint8, 1 where the lesion is; into `out` where one is given."""
        return self._decode(number, format.MASK, out)

    def sample(self, number: int, image: np.ndarray, mask: np.ndarray) -> None:
        """Decode a sample into an image (H, W, 3) and a mask (H, W), both uint8 and contiguous."""
        self.image(number, image)
        self.mask(number, mask)

    def original_mask(self, number: int) -> np.ndarray | None:
        """The mask at its original resolution (H, W) uint8, or None where the set does not carry it."""
        return self._decode(number, format.ORIGINAL) if self.table["size"][number, format.ORIGINAL] else None

    def meta(self, number: int) -> dict[str, Any]:
        """The sample's JSON."""
        return json.loads(bytes(self.read(number, format.META)))

    def _decode(self, number: int, member: int, out: np.ndarray | None = None) -> np.ndarray:
        data = self.read(number, member)
        decode = codecs.decode_image if member == format.IMAGE else codecs.decode_mask
        try:
            return decode(data, out)
        except (ValueError, OSError, SyntaxError) as error:  # Pillow calls a broken PNG a SyntaxError
            shard = self.entries[self.table["shard"][number]]["name"]
            name = f"{self.key(number)}.{format.MEMBERS[member]}"
            raise CorruptShardError(f"{shard}: {name} does not decode ({error})") from error

    def file(self, shard: int) -> BinaryIO:
        """A shard by its place in the list, open; of a remote set its copy, fetched where there is none.

        Raises CorruptShardError when it is missing or not the one of the index, and what `Copies.open` raises.
        """
        entry = self.entries[shard]
        if self.copies:
            return self.copies.open(entry, lambda path: self._inspect(shard, path))
        try:
            return (self.root / entry["name"]).open("rb")
        except FileNotFoundError as error:
            raise CorruptShardError(f"{self.root / entry['name']}: the shard is missing; copy it again") from error

    def start_pass(self, order: np.ndarray) -> Callable[[int], None]:
        """Announce a pass over the samples, all ranks together, in `order`: sample numbers, int64 (n,).

        Call what is returned with a place in `order` when the pass begins there, and whenever all before it is read.
        Shards of a remote set are fetched ahead of that place, and those behind it may be evicted. Raises UsageError
        when the cache is too small.
        """
        if not self.copies:
            return lambda place: None
        from shards.remote.prefetch import Pass

        return Pass(self.table["shard"][order], self.entries, self.copies, self._let_go).at

    def _let_go(self, shard: int) -> None:
        self._maps.pop(shard, None)

    def _open(self, shard: int) -> mmap.mmap:
        # Two threads may both map a shard for the first time: one of the two maps is dropped unused.
        if shard not in self._maps:
            with self.file(shard) as file:
                try:
                    self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                except ValueError as error:
                    raise CorruptShardError(f"{file.name}: the shard is empty; copy it again") from error
        return self._maps[shard]

    def _member(self, shard: mmap.mmap | bytes, number: int, member: int) -> memoryview:
        """The bytes of a member in its shard's, when they are those of the index."""
        row = self.table[number]
        start, size = layout.member_spans(int(row["offset"]), row["size"].tolist())[member]
        data = memoryview(shard)[start : start + size]
        name = self.entries[row["shard"]]["name"]
        _checked(data, int(row["crc"][member]), name, self.key(number), member)
        return data

    def _inspect(self, shard: int, path: Path) -> None:
        """Raises CorruptShardError that names the first wrong member of a shard that was fetched to `path`."""
        data = path.read_bytes()
        for number in np.flatnonzero(self.table["shard"] == shard):
            for member in np.flatnonzero(self.table["size"][number]):
                self._member(data, int(number), int(member))


@dataclass(frozen=True)
class ShardSet:
    """An open shard set: its index and its splits."""

    root: Path
    """The folder of the set; of a remote one, of its copies on this node."""
    index: dict[str, Any] = field(repr=False)
    copies: Copies | None = field(default=None, repr=False, compare=False)
    """Of a remote set, its copies on this node."""

    @classmethod
    def open(cls, place: str | Path, cache: NodeCache | None = None) -> Self:
        """Open the set in a folder or behind an fsspec URL. Raises ShardSetError when there is none, or of another
        version.

        `cache`: where copies of remote shards are kept; the default one where it is not given.
        """
        if "://" in str(place):
            return cls._open_remote(str(place), cache)
        root = Path(place)
        path = root / format.INDEX_NAME
        if not path.is_file():
            what = "there is no such folder" if not root.is_dir() else "no complete shard set (no index.json)"
            raise ShardSetError(f"{root}: {what}; make one with: isic-shards build --out {root} ...")
        return cls(root, format.parse_index(path.read_bytes(), str(path)))

    @classmethod
    def _open_remote(cls, url: str, cache: NodeCache | None) -> Self:
        # Late: a set in a folder needs no fsspec.
        from shards.remote.cache import Copies, NodeCache
        from shards.remote.folder import RemoteFolder

        remote = RemoteFolder(url)
        index = format.parse_index(remote.read(format.INDEX_NAME), f"{remote.location}/{format.INDEX_NAME}")
        copies = Copies(remote, cache or NodeCache(), index["digest"])
        return cls(copies.root, index, copies)

    @property
    def location(self) -> str:
        """The folder or URL of the set, for messages."""
        return self.copies.remote.location if self.copies else str(self.root)

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
            raise UsageError(f"{self.location}: no split {name!r}; it has {', '.join(sorted(splits))}")
        entry = splits[name]
        table = np.load(io.BytesIO(self._table(entry["table"])), allow_pickle=False)
        return Split(self.root, name, self.digest, table, tuple(entry["shards"]), self.size, self.copies)

    def _table(self, entry: dict[str, Any]) -> bytes:
        """The bytes of a sample table."""
        if self.copies:
            with self.copies.open(entry) as file:
                data = file.read()
        else:
            path = self.root / entry["name"]
            if not path.is_file():
                raise ShardSetError(f"{path}: the sample table is missing; copy or build the set again")
            data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            if self.copies:
                self.copies.drop(entry)
            raise CorruptShardError(
                f"{self.root / entry['name']}: not the bytes that the index names; copy or build the set again"
            )
        return data


def _checked(data: bytes | memoryview, crc: int, shard: str, key: str, member: int) -> bytes | memoryview:
    """`data`, when its CRC-32 is `crc`. Raises CorruptShardError that names shard, key and member."""
    if isal_zlib.crc32(data) != crc:
        raise CorruptShardError(
            f"{shard}: {key}.{format.MEMBERS[member]} is corrupt (its CRC-32 is not the index's); "
            "copy the shard again or rebuild the set"
        )
    return data
