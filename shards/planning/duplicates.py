"""Find duplicate images, so that they stay in one split: same bytes, same pixels, or a near perceptual hash (pHash).

An image is reduced to 32 × 32 grey pixels, and its hash is the signs of the 256 lowest frequencies of their cosine
transform (pHash). Two images are near-duplicates when at most `MAX_DISTANCE` of the 256 bits differ and one of the
16 words of 16 bits is the same in both; the latter keeps a set of a million from comparing all with all. The hash
hardly changes with colour balance, compression and resolution; it does with rotation, mirroring and cropping.

Of an image that is copied (--size original), `bytes_hash` replaces the perceptual hash, and only an image with the
same bytes is its duplicate. The bytes are compared where size and ends are the same.

Among the 2,594 training images of ISIC 2018 at 128 × 128 it finds 20 pairs, each one photograph twice, most of them
recoloured, and none by mistake: the nearest two of different lesions are 54 bits apart. It misses 19 pairs, 47 to 89
bits apart, which are recoloured more (looked at one by one; there may be others). At other sizes a pair that is 39 bits
apart here has up to 43, and is missed too.
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

MAX_DISTANCE = 40  # bits of the hash in which near-duplicates may differ
SIDE = 32  # pixels of each side of the reduced image
BITS = 256

Kind = Literal["bytes", "pixels", "near"]


@dataclass(frozen=True, slots=True, order=True)
class Duplicate:
    """Two images that show the same thing."""

    key: str
    """The greater of the two keys."""
    duplicate_of: str
    """The smaller of the two keys."""
    kind: Kind
    """The closest match of the two: bytes, pixels (of other bytes), or near (a near hash only)."""
    distance: int
    """Number of bits in which the hashes differ."""


def perceptual_hash(picture: Image.Image) -> bytes:
    """Perceptual hash (32 bytes) of an RGB or grey picture, which may have been decoded at a reduced scale."""
    # Reduced by a whole factor first: the same but for rounding, in half of the time.
    small = picture.resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=8)
    return hash_of(np.asarray(small.convert("L")))


def bytes_hash(size: int, ends: bytes) -> bytes:
    """Hash (32 bytes) of a file's size and ends: images with the same bytes have the same one."""
    return hashlib.sha256(size.to_bytes(8, "little") + ends).digest()


def hash_of(grey: np.ndarray) -> bytes:
    """Perceptual hash of a grey picture (32, 32) uint8. Integers only, so it is the same on every machine."""
    spectrum = COSINES @ grey.astype(np.int64) @ COSINES.T  # (32, 32)
    return np.packbits(spectrum.ravel()[LOWEST] > 0).tobytes()


def near_pairs(hashes: np.ndarray) -> list[tuple[int, int, int]]:
    """Find near-duplicates: the pairs (i, j, distance), i < j, of indices of near hashes, sorted.

    `hashes` is (n, 32) uint8. Equal hashes are paired with the first of them only.
    """
    unique, first, inverse = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
    first_of = first[inverse.ravel()]
    pairs = {(int(i), j, 0) for j, i in enumerate(first_of.tolist()) if i != j}
    words = np.ascontiguousarray(unique).view(np.uint16)  # (u, 16)
    for column in range(words.shape[1]):
        order = np.argsort(words[:, column], kind="stable")
        word, bits = words[order, column], unique[order].view(np.uint64)  # (u,), (u, 4)
        # Hashes that share this word are adjacent in `order`: compare each with its neighbours at growing offsets.
        start, offset = np.arange(len(order)), 1
        while len(start):
            start = start[start + offset < len(order)]
            start = start[word[start] == word[start + offset]]
            distance = np.bitwise_count(bits[start] ^ bits[start + offset]).sum(axis=1, dtype=np.int64)
            for near in np.flatnonzero(distance <= MAX_DISTANCE):
                rows = (order[start[near]], order[start[near] + offset])
                i, j = sorted(int(first[row]) for row in rows)
                pairs.add((i, j, int(distance[near])))
            offset += 1
    return sorted(pairs)


def kind_of(first: Pair, second: Pair, sources: list[Source], *, copied: bool) -> Kind | None:
    """Compare two images with near hashes, both of good pairs: same bytes, same pixels, or only near.

    `copied`: their hashes are those of bytes; None where the bytes turn out to differ.
    """
    one, other = (sources[pair.image.source].read(pair.image.name) for pair in (first, second))
    if one == other:
        return "bytes"
    if copied:
        return None
    try:
        pixels = [np.asarray(load_image(pair.image, sources, "original", None)[0]) for pair in (first, second)]
    except BadPairError:  # packing decodes by another decoder and at a reduced scale, which did not fail
        return "near"
    return "pixels" if np.array_equal(pixels[0], pixels[1]) else "near"


def merge_groups(groups: Mapping[str, str], duplicates: Iterable[Duplicate]) -> dict[str, str]:
    """Union-find: map each group that duplicates connect to another to the smallest name of the connected groups.

    `groups` gives the group of a key; a key that it lacks is a group of its own. A set that grows moves an image
    only when a new duplicate connects its group to one with a smaller name.
    """
    parent: dict[str, str] = {}

    def root_of(name: str) -> str:
        while (above := parent.setdefault(name, name)) != name:
            parent[name] = name = parent[above]
        return name

    for duplicate in duplicates:
        ends = (duplicate.key, duplicate.duplicate_of)
        smallest, other = sorted(root_of(groups.get(key, key)) for key in ends)
        parent[other] = smallest
    return {name: root_of(name) for name in parent}


def _cosines() -> np.ndarray:
    """Matrix (32, 32) int64 of the cosine transform (DCT-II), scaled to integers."""
    k = np.arange(SIDE)
    return np.rint(4096 * np.cos(np.pi * (2 * k[None] + 1) * k[:, None] / (2 * SIDE))).astype(np.int64)


def _lowest() -> np.ndarray:
    """Flat indices (256,) of the lowest frequencies in a (32, 32) spectrum, by u + v, without the mean."""
    u, v = np.indices((SIDE, SIDE))
    return np.lexsort((u.ravel(), (u + v).ravel()))[1 : BITS + 1]


COSINES = _cosines()
LOWEST = _lowest()
