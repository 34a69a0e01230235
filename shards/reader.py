"""Open a shard set and read any of its samples by index, every byte checked against the index of the set.

A local set is read in place. The shards of a remote one are downloaded into the node's cache (`shards.remote`).
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from shards import codecs, format, layout
from shards.errors import CorruptShardError, ShardSetError, UsageError
from shards.format import FileEntry, Index, ShardEntry
from shards.geometry import ResizePlan

if TYPE_CHECKING:
    from shards.remote.cache import CachedSet, NodeCache

REMOTE_WINDOW = 16
"""Shards of a remote set that are shuffled together by default: all of them must be in the cache at once."""


@dataclass(kw_only=True, eq=False)
class Split:
    """One split of an open shard set. A sample's index is its row in the sample table, from 0. Threads may share it."""

    root: Path
    """The folder of the set; for a remote one, of its cached files on this node."""
    name: str
    digest: str
    """The digest of the whole set."""
    table: np.ndarray = field(repr=False)
    """The sample table (n,), of `format.sample_dtype`."""
    entries: tuple[ShardEntry, ...] = field(repr=False)
    """The shards, as the index lists them."""
    size: int | None
    """Side of the images in pixels; None when each keeps its original size."""
    cached_set: CachedSet | None = field(default=None, repr=False)
    """The node's cache of the set, when it is remote."""
    _maps: dict[int, mmap.mmap] = field(default_factory=dict[int, mmap.mmap], init=False, repr=False)
    """The shards that are mapped into memory, by position in `entries`."""

    def __len__(self) -> int:
        return len(self.table)

    def __getstate__(self) -> dict[str, Any]:
        # The workers of a DataLoader that are not forked (Python 3.14's default) map the shards anew.
        return self.__dict__ | {"_maps": {}}

    @property
    def location(self) -> str:
        """The folder or URL of the set, for messages."""
        return self.cached_set.remote.location if self.cached_set else str(self.root)

    @cached_property
    def shards(self) -> tuple[str, ...]:
        """The names of the shards, relative to the set."""
        return tuple(entry.name for entry in self.entries)

    @property
    def window(self) -> int | None:
        """Shards that are shuffled together by default; None: all, as for every local set."""
        return REMOTE_WINDOW if self.cached_set and len(self.entries) > REMOTE_WINDOW else None

    @property
    def shard_samples(self) -> NDArray[np.int64]:
        """Samples in each shard, (number of shards,): the epoch's order is derived from it."""
        return np.bincount(self.table["shard"], minlength=len(self.entries)).astype(np.int64)

    def key(self, index: int) -> str:
        """Give the key (ISIC id) of a sample."""
        return self.table["key"][index].decode()

    def read(self, index: int, member: int) -> memoryview:
        """Read the bytes of one member (`format.IMAGE`, ...) of a sample; empty if the sample has no such member.

        Downloads the shard if it is remote and not cached. Raises CorruptShardError with shard, key and member when
        the bytes do not have the CRC-32 of the table, and whatever `open_shard` raises.
        """
        shard = int(self.table["shard"][index])
        if not self.table["size"][index, member]:
            return memoryview(b"")
        try:
            return self._read_member(self._map_shard(shard), index, member)
        except CorruptShardError:
            if self.cached_set:  # or the next run would read this file too
                self.cached_set.drop(self.entries[shard])
            raise

    def image(self, index: int, out: np.ndarray | None = None) -> np.ndarray:
        """Decode the image (H, W, 3) uint8 RGB, into `out` (contiguous, same shape and type) if given."""
        return self._decode(index, format.IMAGE, out)

    def mask(self, index: int, out: np.ndarray | None = None) -> np.ndarray:
        """Decode the mask (H, W) uint8, 1 where the lesion is, into `out` if given."""
        return self._decode(index, format.MASK, out)

    def sample(self, index: int, image: np.ndarray, mask: np.ndarray) -> None:
        """Decode a sample into an image (H, W, 3) and a mask (H, W), both uint8 and contiguous."""
        self.image(index, image)
        self.mask(index, mask)

    def original_mask(self, index: int) -> np.ndarray | None:
        """Decode the mask at its original resolution (H, W) uint8; None if the set does not contain it."""
        return self._decode(index, format.ORIGINAL) if self.table["size"][index, format.ORIGINAL] else None

    def meta(self, index: int) -> dict[str, Any]:
        """Parse the JSON of a sample (`shards.format`)."""
        try:
            return format.parse_json(bytes(self.read(index, format.META)))
        except ValueError as error:
            raise self._corrupt(index, format.META, f"is not a sample's JSON ({error})") from error

    def resize_plan(self, index: int) -> ResizePlan:
        """Give the plan by which the image was resized, and by which a prediction returns to the original's size."""
        try:
            return ResizePlan.from_json(self.meta(index)["fit"])
        except (KeyError, TypeError) as error:
            raise self._corrupt(index, format.META, "does not say how the image was resized") from error

    def open_shard(self, shard: int) -> BinaryIO:
        """Open a shard by its position in `entries`, downloading it if it is remote and not cached.

        Raises CorruptShardError when it is missing or not the one of the index, and whatever `CachedSet.open` raises.
        """
        entry = self.entries[shard]
        if self.cached_set:
            return self.cached_set.open(entry, lambda path: self._check_members(shard, path))
        try:
            return (self.root / entry.name).open("rb")
        except FileNotFoundError as error:
            raise CorruptShardError(
                f"{self.root / entry.name}: the shard is missing; copy it again", shard=entry.name
            ) from error

    def start_pass(self, order: np.ndarray) -> Callable[[int], None]:
        """Start a pass over sample indices `order`, int64 (n,), of all ranks together. Returns `advance(position)`.

        Call `advance` with the position in `order` where the pass begins, and again when all samples before a position
        have been read. For a remote set it prefetches the shards that come next and releases finished ones, which may
        then be evicted. Raises UsageError when the cache is too small.
        """
        if not self.cached_set:
            return lambda position: None
        from shards.remote.prefetch import ShardPrefetcher

        return ShardPrefetcher(self.table["shard"][order], self.entries, self.cached_set, self._unmap_shard).advance

    def _decode(self, index: int, member: int, out: np.ndarray | None = None) -> np.ndarray:
        data = self.read(index, member)
        decode = codecs.decode_image if member == format.IMAGE else codecs.decode_mask
        try:
            return decode(data, out)
        except (ValueError, OSError, SyntaxError) as error:  # Pillow calls a broken PNG a SyntaxError
            raise self._corrupt(index, member, f"does not decode ({error})") from error

    def _map_shard(self, shard: int) -> mmap.mmap:
        # Two threads may both map a shard for the first time: one of the two maps is then dropped unused.
        if shard not in self._maps:
            with self.open_shard(shard) as file:
                try:
                    self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                except ValueError as error:
                    raise CorruptShardError(
                        f"{file.name}: the shard is empty; copy it again", shard=self.entries[shard].name
                    ) from error
        return self._maps[shard]

    def _unmap_shard(self, shard: int) -> None:
        self._maps.pop(shard, None)

    def _read_member(self, data: mmap.mmap | bytes, index: int, member: int) -> memoryview:
        """Slice a member out of the bytes of its shard. Raises CorruptShardError unless its CRC-32 is the table's."""
        row = self.table[index]
        start, size = layout.member_spans(int(row["offset"]), row["size"].tolist())[member]
        body = memoryview(data)[start : start + size]
        if isal_zlib.crc32(body) != int(row["crc"][member]):
            what = "is corrupt (its CRC-32 is not the index's); copy the shard again or rebuild the set"
            raise self._corrupt(index, member, what)
        return body

    def _check_members(self, shard: int, path: Path) -> None:
        """Raise CorruptShardError for the first damaged member of a shard that was downloaded to `path`."""
        data = path.read_bytes()
        for index in np.flatnonzero(self.table["shard"] == shard):
            for member in np.flatnonzero(self.table["size"][index]):
                self._read_member(data, int(index), int(member))

    def _corrupt(self, index: int, member: int, what: str) -> CorruptShardError:
        """Make the error about a member of a sample, with its shard and key."""
        shard, key, name = self.entries[int(self.table["shard"][index])].name, self.key(index), format.MEMBERS[member]
        return CorruptShardError(f"{shard}: {key}.{name} {what}", shard=shard, key=key, member=name)


@dataclass(frozen=True, kw_only=True)
class ShardSet:
    """An open shard set: its index and its splits."""

    root: Path
    """The folder of the set; for a remote one, of its cached files on this node."""
    index: Index = field(repr=False)
    cached_set: CachedSet | None = field(default=None, repr=False, compare=False)
    """The node's cache of the set, when it is remote."""

    @classmethod
    def open(cls, location: str | Path, cache: NodeCache | None = None) -> Self:
        """Open the set in a folder or at an fsspec URL.

        `cache`: the cache for remote shards; by default the user's, without a limit. Raises ShardSetError when there
        is no complete set or one of another version, CorruptShardError when its index is damaged.
        """
        if "://" in str(location):
            return cls._open_remote(str(location), cache)
        root = Path(location)
        path = root / format.INDEX_NAME
        if not path.is_file():
            what = "there is no such folder" if not root.is_dir() else "no complete shard set (no index.json)"
            raise ShardSetError(f"{root}: {what}; make one with: isic-shards build --out {root} ...")
        return cls(root=root, index=Index.parse(path.read_bytes(), str(path)))

    @classmethod
    def _open_remote(cls, url: str, cache: NodeCache | None) -> Self:
        # Late: a set in a folder needs no fsspec.
        from shards.remote.cache import CachedSet, NodeCache
        from shards.remote.folder import RemoteFolder

        remote = RemoteFolder(url)
        index = Index.parse(remote.read(format.INDEX_NAME), f"{remote.location}/{format.INDEX_NAME}")
        cached_set = CachedSet(remote, cache or NodeCache(), index.digest)
        return cls(root=cached_set.root, index=index, cached_set=cached_set)

    @property
    def location(self) -> str:
        """The folder or URL of the set, for messages."""
        return self.cached_set.remote.location if self.cached_set else str(self.root)

    @property
    def digest(self) -> str:
        """sha256 that identifies the whole set."""
        return self.index.digest

    @property
    def size(self) -> int | None:
        """Side of the square images in pixels; None when each keeps its original size."""
        return self.index.size

    @property
    def fit(self) -> str:
        """The resize mode of the images: stretch, pad, crop or original (`ResizePlan.mode`).

        Raises ShardSetError for an index without it: an older version has built the set.
        """
        try:
            return self.index.built["fit"]
        except KeyError as error:
            raise ShardSetError(
                f"{self.location}: its index does not say how the images were resized; build the set again"
            ) from error

    def describe(self) -> dict[str, Any]:
        """Give the samples of each split and the counts of the build, excluded pairs among them, as plain values."""
        splits = {name: entry.samples for name, entry in self.index.splits.items()}
        return {"splits": splits, "counts": self.index.counts.to_json()}

    def split(self, name: str) -> Split:
        """Open one split and check its table.

        Raises UsageError for a name the set does not have, ShardSetError when the table is missing or cannot be
        downloaded, CorruptShardError when it is damaged.
        """
        splits = self.index.splits
        if name not in splits:
            raise UsageError(f"{self.location}: no split {name!r}; it has {', '.join(sorted(splits))}")
        entry = splits[name]
        try:
            table = format.parse_table(self._read_table(entry.table), len(entry.shards))
        except ValueError as error:
            where, what = self.root / entry.table.name, str(error).partition("\n")[0]  # NumPy gives advice, too
            raise CorruptShardError(f"{where}: not a sample table ({what}); build the set again") from error
        return Split(
            root=self.root,
            name=name,
            digest=self.digest,
            table=table,
            entries=entry.shards,
            size=self.size,
            cached_set=self.cached_set,
        )

    def _read_table(self, entry: FileEntry) -> bytes:
        if self.cached_set:
            with self.cached_set.open(entry) as file:
                data = file.read()
        else:
            path = self.root / entry.name
            if not path.is_file():
                raise ShardSetError(f"{path}: the sample table is missing; copy or build the set again")
            data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            if self.cached_set:
                self.cached_set.drop(entry)
            raise CorruptShardError(
                f"{self.root / entry.name}: not the bytes that the index names; copy or build the set again",
                shard=entry.name,
            )
        return data
