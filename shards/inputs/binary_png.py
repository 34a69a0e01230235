"""Decode 8-bit PNGs of black and white only, as masks are, in half of Pillow's time.

The rows of a PNG are filtered (PNG specification, section 9): a byte says by how much a pixel differs from what its
neighbours predict. In a mask hardly any differs, so isal inflates the bytes, NumPy finds those that are not 0, and only
there a row is changed. All else is for Pillow: greys, the filter Average, interlacing, palettes, transparency, other
depths, EXIF, and whatever is damaged.
"""

from __future__ import annotations

import itertools
import struct

import numpy as np
from isal import isal_zlib

from shards import codecs
from shards.inputs.headers import plain_chunks

_KIND = bytes((8, 0, 0, 0, 0))  # 8 bits, grey; deflate, filters by row, not interlaced
_NONE, _SUB, _UP, _PAETH = 0, 1, 2, 4
_BLACK, _WHITE = 1, 255  # what is added to white to make black, and to black to make white: modulo 256
_MAX_DIFFERING = 16  # 8-byte words per row with a pixel that is not as predicted; with more Pillow is quicker


def decode_binary_png(data: bytes) -> np.ndarray | None:
    """Decode an upright PNG of 0 and 255 to (H, W) uint8; None for one that Pillow has to decode, or to refuse."""
    if data[:16] != codecs.PNG_START or data[24:29] != _KIND:
        return None
    width, height = struct.unpack(">II", data[16:24])
    chunks = plain_chunks(data)
    if chunks is None or not 0 < width * height <= codecs.MAX_PIXELS or height > codecs.MAX_JPEG_SIDE:
        return None  # no picture that a JPEG could have is higher: its rows would fill the memory as a list
    compressed = b"".join(data[start:end] for kind, start, end in chunks if kind == b"IDAT")
    length = height * (width + 1)  # each row begins with the type of its filter
    inflate = isal_zlib.decompressobj()
    try:
        inflated = inflate.decompress(compressed, length + 1)
    except isal_zlib.error:  # pyright: ignore[reportGeneralTypeIssues]  its stub declares an instance
        return None
    if len(inflated) != length or not inflate.eof:
        return None
    return _unfiltered(np.frombuffer(inflated, np.uint8).reshape(height, width + 1))


def _unfiltered(rows: np.ndarray) -> np.ndarray | None:
    """Undo the filters of rows (H, 1 + W) uint8, its filter in front; None where not all is black or white."""
    filters, width = rows[:, 0].tolist(), rows.shape[1] - 1
    if not any(filters):
        return rows[:, 1:] if (rows + np.uint8(1)).max() <= 1 else None  # 255 + 1 is 0
    differing = _differing(rows)
    if differing is None or not {_NONE, _SUB, _UP, _PAETH}.issuperset(filters):
        return None
    ys, xs, added = differing
    bounds, columns = np.searchsorted(ys, np.arange(len(rows) + 1)).tolist(), xs.tolist()
    lines: list[bytearray] = []
    above = black = bytearray(width)
    for kind, (first, last) in zip(filters, itertools.pairwise(bounds), strict=True):
        line = above if kind in (_UP, _PAETH) else black
        if first < last:
            line = _UNFILTER[kind](columns[first:last], line)
        lines.append(line)
        above = line
    pixels = np.frombuffer(b"".join(lines), np.uint8).reshape(len(rows), width)
    # Black and white are made by what was added to the other of the two.
    return pixels if (added == np.where(pixels[ys, xs], _WHITE, _BLACK)).all() else None


def _differing(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Find the pixels of rows (H, 1 + W) that are not as predicted: their y, their x, and what was added to them.

    None when they are many.
    """
    flat = rows.reshape(-1)
    whole = len(flat) // 8 * 8
    words = np.flatnonzero(flat[:whole].view(np.uint64) != 0)  # without the comparison it takes three times as long
    if len(words) > _MAX_DIFFERING * len(rows):
        return None
    word, byte = np.nonzero(flat[:whole].reshape(-1, 8)[words])
    places = np.concatenate([words[word] * 8 + byte, whole + np.flatnonzero(flat[whole:])])
    ys, columns = np.divmod(places, rows.shape[1])
    pixels = columns > 0
    return ys[pixels], columns[pixels] - 1, flat[places[pixels]]


def _unfilter_none_or_up(differing: list[int], predicted: bytearray) -> bytearray:
    """Draw a row of which the pixels at the x in `differing` are not as in `predicted`: the row above, or black."""
    line = bytearray(predicted)
    for x in differing:
        line[x] ^= 255
    return line


def _unfilter_sub(differing: list[int], black: bytearray) -> bytearray:
    """Draw a row of which the pixels at the x in `differing` are not like the one to their left."""
    line = bytearray(black)
    for start, end in zip(differing[::2], [*differing[1::2], len(line)], strict=False):  # the last may reach to the end
        line[start:end] = b"\xff" * (end - start)
    return line


def _unfilter_paeth(differing: list[int], above: bytearray) -> bytearray:
    """Draw a row of which the pixels at the x in `differing` are not as Paeth predicts.

    Of two values, it predicts the one above where that is not like the one to its left, else the one to the left.
    """
    row = np.frombuffer(above, np.uint8)
    edges_above = np.flatnonzero(np.diff(row, prepend=np.uint8(0))).tolist()
    edges: list[int] = []
    white = 0
    for x in sorted({*edges_above, *differing}):
        predicted = above[x] if x in edges_above else white
        if predicted ^ (255 if x in differing else 0) != white:
            edges.append(x)
            white ^= 255
    return _unfilter_sub(edges, bytearray(len(above)))


_UNFILTER = {_NONE: _unfilter_none_or_up, _SUB: _unfilter_sub, _UP: _unfilter_none_or_up, _PAETH: _unfilter_paeth}
