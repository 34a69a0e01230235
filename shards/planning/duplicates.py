"""Find images that show the same thing, so that they stay in one split: same bytes, same pixels, nearly the same.

An image is reduced to 32 × 32 grey pixels, and its hash is the signs of the 256 lowest frequencies of their cosine
transform (pHash). Two images are near-duplicates when at most `MAX_DISTANCE` of the 256 bits differ and one of the
16 words of 16 bits is the same in both; the latter keeps a set of a million from comparing all with all. The hash
does not feel another colour balance, compression or resolution; it does feel a turn, a mirror and another crop.

An image that is copied as it is (--size original) is not decoded; `bytes_hash` takes the place of the hash, and it is
a duplicate of another one with the same bytes only, which are compared where size and ends are the same.

Of the 2,594 training images of ISIC 2018 it finds 19 pairs, each one photograph twice, most of them recoloured; no
two others are near by mistake (the nearest two of different lesions that share a word are 50 bits apart).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from shards.inputs.decode import BadPairError, load_image
from shards.inputs.match import Pair
from shards.inputs.source import Source

MAX_DISTANCE = 40
SIDE = 32
BITS = 256

Kind = Literal["bytes", "pixels", "near"]


@dataclass(frozen=True, slots=True, order=True)
class Duplicate:
    """Two images that show the same thing."""

    key: str
    """The greater of the two keys."""
    of: str
    """The smaller of the two keys."""
    same: str
    """What they have in common: bytes, pixels (of other bytes), or near (the hash, about)."""
    distance: int
    """Bits of the hash that differ."""


def perceptual_hash(picture: Image.Image) -> bytes:
    """The hash (32 bytes) of an RGB or grey picture, which may have been decoded at a reduced scale."""
    # Reduced by a whole factor first: the same but for rounding, in half of the time.
    small = picture.resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=8)
    return hash_of(np.asarray(small.convert("L")))


def bytes_hash(size: int, ends: bytes) -> bytes:
    """A hash (32 bytes) that tells only which images may have the same bytes: of their number and their ends."""
    return hashlib.sha256(size.to_bytes(8, "little") + ends).digest()


def hash_of(grey: np.ndarray) -> bytes:
    """The hash of a grey picture (32, 32) uint8. Integers only, so it is the same on every machine."""
    spectrum = COSINES @ grey.astype(np.int64) @ COSINES.T  # (32, 32)
    return np.packbits(spectrum.ravel()[LOWEST] > 0).tobytes()


def near_pairs(table: np.ndarray) -> list[tuple[int, int, int]]:
    """The pairs (i, j, distance), i < j, of rows that are near-duplicates, sorted.

    `table` is (n, 32) uint8, a hash in each row. Rows with one and the same hash are paired with the first of
    them only.
    """
    unique, first, inverse = np.unique(table, axis=0, return_index=True, return_inverse=True)
    first_of = first[inverse.ravel()]
    found = {(int(i), j, 0) for j, i in enumerate(first_of.tolist()) if i != j}
    words = np.ascontiguousarray(unique).view(np.uint16)  # (u, 16)
    for word in range(words.shape[1]):
        order = np.argsort(words[:, word], kind="stable")
        rows, wide = words[order, word], unique[order].view(np.uint64)  # (u,), (u, 4)
        # Rows with one word lie together: compare each with the next, then the one after it, while they share it.
        left, step = np.arange(len(rows)), 1
        while len(left):
            left = left[left + step < len(rows)]
            left = left[rows[left] == rows[left + step]]
            distance = np.bitwise_count(wide[left] ^ wide[left + step]).sum(axis=1, dtype=np.int64)
            for place in np.flatnonzero(distance <= MAX_DISTANCE):
                ends = (order[left[place]], order[left[place] + step])
                i, j = sorted(int(first[end]) for end in ends)
                found.add((i, j, int(distance[place])))
            step += 1
    return sorted(found)


def kind_of(left: Pair, right: Pair, sources: list[Source], *, copied: bool) -> Kind | None:
    """How much of two images with near hashes is the same; both can be packed.

    `copied`: their hashes are those of bytes; None where these turn out to differ.
    """
    first, second = (sources[pair.image.source].read(pair.image.name) for pair in (left, right))
    if first == second:
        return "bytes"
    if copied:
        return None
    try:
        pixels = [np.asarray(load_image(pair.image, sources, "original", None)[0]) for pair in (left, right)]
    except BadPairError:  # it was packed by another decoder, from the scale that was wanted
        return "near"
    return "pixels" if np.array_equal(pixels[0], pixels[1]) else "near"


def joined(groups: Mapping[str, str], duplicates: Iterable[Duplicate]) -> dict[str, str]:
    """The name that decides the split, for each group that duplicates tie to another: the least of theirs.

    `groups` gives the group of a key; a key that it lacks is a group of its own. A set that grows moves an image
    only when a new duplicate ties its group to a lesser one.
    """
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while (above := parent.setdefault(name, name)) != name:
            parent[name] = name = parent[above]
        return name

    for duplicate in duplicates:
        least, other = sorted(root(groups.get(key, key)) for key in (duplicate.key, duplicate.of))
        parent[other] = least
    return {name: root(name) for name in parent}


def _cosines() -> np.ndarray:
    k = np.arange(SIDE)
    return np.rint(4096 * np.cos(np.pi * (2 * k[None] + 1) * k[:, None] / (2 * SIDE))).astype(np.int64)


def _lowest() -> np.ndarray:
    """Places of the lowest frequencies in a flat (32, 32) spectrum, by u + v, without the mean."""
    u, v = np.indices((SIDE, SIDE))
    return np.lexsort((u.ravel(), (u + v).ravel()))[1 : BITS + 1]


COSINES = _cosines()
LOWEST = _lowest()
