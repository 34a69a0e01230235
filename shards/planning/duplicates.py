"""Find duplicate images, so that they stay in one split: same bytes, same pixels, or one photograph changed (near).

Two steps find a photograph that is there twice, recoloured, compressed or resized, or with a slightly cropped border:

1. *Candidates.* Each image gets a perceptual hash (pHash). The blue channel, in which lesion and skin differ most, is
   reduced to 32 × 32 pixels and equalised (each pixel becomes its rank), which undoes most changes of colour; the hash
   is the signs of the 128 lowest frequencies of its cosine transform. In candidates at most `MAX_DISTANCE` bits differ,
   and one of `WORDS`, 64 words of 16 bits, is the same; the latter keeps a set of a million from comparing all with
   all.
2. *Comparison.* Both images are decoded in full and compared block by block at 64 × 64 pixels (`same_photograph`): the
   hairs, pores and pattern of one photograph correlate, those of two do not, even if both show a dermatoscope's circle.

A photograph that is mirrored, rotated by some degrees or cropped by a tenth is not found, and neither is a second one
of the same lesion. `benchmarks/duplicates.py` measures what is. Of the size at which a set is built only the hashes
depend, so some candidates at the border.

Of an image that is copied (--size original), `bytes_hash` replaces the perceptual hash, and only an image with the
same bytes is its duplicate. The bytes are compared where size and CRC-32 are the same.
"""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from shards.inputs.decode import BadPairError, load_image
from shards.inputs.match import Pair
from shards.inputs.source import Source

SIDE = 32  # pixels of each side of the image that is hashed
BITS = 128  # of a hash
HASH_BYTES = BITS // 8
MAX_DISTANCE = 32  # bits of the hash in which candidates may differ
WORDS = np.array([[(word + bit * (2 * word + 1)) % BITS for bit in range(16)] for word in range(64)])
"""Positions (64, 16) of the bits of each word: every odd stride through the hash once."""
TEXTURE_SIDE = 64  # pixels of each side of the images that are compared
BLOCK = 8  # pixels of each side of a block
SHIFT = 2  # pixels by which a block may be shifted, each way
MIN_SAME_BLOCKS = 2 / 3  # share of the blocks that correlate in one photograph

Kind = Literal["bytes", "pixels", "near"]


@dataclass(frozen=True, slots=True, order=True)
class Duplicate:
    """Two images that show the same thing."""

    key: str
    """The greater of the two keys."""
    duplicate_of: str
    """The smaller of the two keys."""
    kind: Kind
    """The closest match of the two: bytes, pixels (of other bytes), or near (one photograph, changed)."""
    distance: int
    """Number of bits in which the hashes differ."""


def perceptual_hash(picture: Image.Image) -> bytes:
    """Perceptual hash (`HASH_BYTES` bytes) of an RGB picture, which may have been decoded at a reduced scale."""
    return hash_of(_reduced(picture, SIDE)[..., 2])


def bytes_hash(size: int, crc: int) -> bytes:
    """Hash (`HASH_BYTES` bytes) of a file's size and CRC-32: images with the same bytes have the same one."""
    return hashlib.sha256(struct.pack("<QI", size, crc)).digest()[:HASH_BYTES]


def hash_of(channel: np.ndarray) -> bytes:
    """Perceptual hash of a channel (32, 32) uint8. Integers only, so it is the same on every machine."""
    counts = np.bincount(channel.ravel(), minlength=256)
    ranks = (2 * np.cumsum(counts) - counts)[channel]  # twice the mean rank of equal pixels: (32, 32)
    spectrum = COSINES @ ranks @ COSINES.T  # (32, 32)
    return np.packbits(spectrum.ravel()[LOWEST] > 0).tobytes()


def near_pairs(hashes: np.ndarray) -> list[tuple[int, int, int]]:
    """Find the candidates: the pairs (i, j, distance), i < j, of indices of near hashes, sorted.

    `hashes` is (n, HASH_BYTES) uint8. Equal hashes, of one photograph or of blank ones, are paired with the
    first of them only.
    """
    unique, first, inverse = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
    first_of = first[inverse.ravel()]
    pairs = {(int(i), j, 0) for j, i in enumerate(first_of.tolist()) if i != j}
    unpacked = np.unpackbits(unique, axis=1)  # (u, 128)
    for positions in WORDS:
        words = np.ascontiguousarray(np.packbits(unpacked[:, positions], axis=1)).view(np.uint16).ravel()  # (u,)
        order = np.argsort(words, kind="stable")
        word, bits = words[order], unique[order].view(np.uint64)  # (u,), (u, 2)
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
    """Compare two images with near hashes, both of good pairs; None when they are no duplicates.

    `copied`: their hashes are those of bytes, and only the same bytes make them duplicates.
    """
    one, other = (sources[pair.image.source].read(pair.image.name) for pair in (first, second))
    if one == other:
        return "bytes"
    if copied:
        return None
    try:
        pictures = [load_image(pair.image, sources, "original", None)[0] for pair in (first, second)]
    except BadPairError:  # packing decodes by another decoder and at a reduced scale, which did not fail
        return "near"
    if np.array_equal(np.asarray(pictures[0]), np.asarray(pictures[1])):
        return "pixels"
    return "near" if same_photograph(*pictures) else None


def same_photograph(first: Image.Image, second: Image.Image) -> bool:
    """Compare two RGB pictures block by block; True if they are one photograph, recoloured, resized or compressed.

    Two thirds of the 49 blocks of 8 × 8 pixels, at 64 × 64 and without what is smooth, have a correlation of 0.5 or
    more with the other picture. Each may be shifted by up to 2 pixels, for pictures that are cropped by some percent.
    """
    texture, other = (_texture(_reduced(picture, TEXTURE_SIDE)[..., 1]) for picture in (first, second))
    blocks, variance = _centred_blocks(texture, 0, 0)
    same = np.zeros(len(blocks), bool)
    for dy, dx in itertools.product(range(-SHIFT, SHIFT + 1), repeat=2):
        shifted, other_variance = _centred_blocks(other, dy, dx)
        covariance = (blocks * shifted).sum(axis=1).astype(np.float64)  # exact, as all sums are: integers below 2^53
        same |= (covariance > 0) & (4 * covariance**2 >= variance * other_variance)
    return bool(same.mean() >= MIN_SAME_BLOCKS)


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


def _reduced(picture: Image.Image, side: int) -> np.ndarray:
    """Reduce a picture to (side, side, 3) uint8 by the means of its pixels."""
    # By a whole factor first: the same but for rounding, in half of the time.
    return np.asarray(picture.resize((side, side), Image.Resampling.BOX, reducing_gap=8))


def _texture(channel: np.ndarray) -> np.ndarray:
    """Subtract from each pixel of (64, 64) uint8 the mean of the 5 × 5 around it; int64, times 25."""
    windows = sliding_window_view(np.pad(channel.astype(np.int64), 2, mode="edge"), (5, 5))
    return 25 * channel.astype(np.int64) - windows.sum(axis=(2, 3))


def _centred_blocks(texture: np.ndarray, dy: int, dx: int) -> tuple[np.ndarray, np.ndarray]:
    """Divide a texture, shifted and without its border, into blocks; their values less the mean and sum of squares.

    int64 (49, 64), times 64, and float64 (49,).
    """
    border = BLOCK // 2
    inner = texture[border + dy : TEXTURE_SIDE - border + dy, border + dx : TEXTURE_SIDE - border + dx]  # (56, 56)
    count = len(inner) // BLOCK
    blocks = inner.reshape(count, BLOCK, count, BLOCK).swapaxes(1, 2).reshape(count**2, BLOCK**2)
    centred = BLOCK**2 * blocks - blocks.sum(axis=1, keepdims=True)
    return centred, (centred**2).sum(axis=1).astype(np.float64)


def _cosines() -> np.ndarray:
    """Matrix (32, 32) int64 of the cosine transform (DCT-II), scaled to integers."""
    k = np.arange(SIDE)
    return np.rint(4096 * np.cos(np.pi * (2 * k[None] + 1) * k[:, None] / (2 * SIDE))).astype(np.int64)


def _lowest() -> np.ndarray:
    """Flat indices (128,) of the lowest frequencies in a (32, 32) spectrum, by u + v, without the mean."""
    u, v = np.indices((SIDE, SIDE))
    return np.lexsort((u.ravel(), (u + v).ravel()))[1 : BITS + 1]


COSINES = _cosines()
LOWEST = _lowest()
