"""Decode 8-bit greyscale PNGs, as masks are, in half of Pillow's time: inflated by isal, unfiltered by numpy.

The filters of a PNG's rows (PNG specification, section 9) are undone for many rows at once: those of a run of Sub side
by side, those of a run of Up by a sum down the columns. Paeth needs one pixel after the other in general, but not in a
picture of two values, 0 and 255. All else is for Pillow: Average, Paeth among greys, interlacing, palettes,
transparency, other depths, EXIF, and whatever is damaged.
"""

from __future__ import annotations

import struct

import numpy as np
from isal import isal_zlib

from shards import codecs

_KIND = bytes((8, 0, 0, 0, 0))  # 8 bits, grey; deflate, filters by row, not interlaced
_NONE, _SUB, _UP, _PAETH = 0, 1, 2, 4
# Chunks that change how a pixel is read, or may turn the picture: with these keywords a text has EXIF or XMP in it.
_REFUSED = (b"PLTE", b"tRNS", b"eXIf")
_TEXTS, _TURNING = (b"tEXt", b"zTXt", b"iTXt"), (b"Raw profile type", b"XML:com.adobe.xmp")
_FIRST = np.zeros(1, np.int64)


def decode_grey_png(data: bytes) -> np.ndarray | None:
    """Decode an upright PNG to (H, W) uint8; None for one that Pillow has to decode, or to refuse."""
    if data[:16] != codecs.PNG_START or data[24:29] != _KIND:
        return None
    width, height = struct.unpack(">II", data[16:24])
    compressed = _image_data(data)
    if compressed is None or not 0 < width * height <= codecs.MAX_PIXELS:
        return None
    length = height * (width + 1)  # each row begins with the type of its filter
    inflate = isal_zlib.decompressobj()
    try:
        inflated = inflate.decompress(compressed, length + 1)
    except isal_zlib.error:  # pyright: ignore[reportGeneralTypeIssues]  its stub declares an instance
        return None
    if len(inflated) != length or not inflate.eof:
        return None
    rows = np.frombuffer(inflated, np.uint8).reshape(height, width + 1)
    return _unfiltered(rows[:, 0], rows[:, 1:])


def _image_data(data: bytes) -> bytes | None:
    """Join the IDAT chunks; None when a chunk is damaged or missing, or changes how a pixel is read."""
    start, found = 8, []
    while len(head := data[start : start + 8]) == 8:
        end = start + 8 + int.from_bytes(head[:4], "big")
        if head[4:] in _REFUSED or (head[4:] in _TEXTS and data.startswith(_TURNING, start + 8)):
            return None
        if isal_zlib.crc32(data[start + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return None
        if head[4:] == b"IDAT":
            found.append(data[start + 8 : end])
        elif head[4:] == b"IEND":
            return b"".join(found)
        start = end + 4
    return None


def _unfiltered(filters: np.ndarray, rows: np.ndarray) -> np.ndarray | None:
    """Undo the filters (H,) of `rows` (H, W) uint8; None where that takes one pixel after the other."""
    pixels = np.empty(rows.shape, np.uint8)
    start = 0
    for end in [*(np.flatnonzero(np.diff(filters)) + 1).tolist(), len(rows)]:
        kind = int(filters[start])
        if kind == _NONE:
            pixels[start:end] = rows[start:end]
        elif kind == _SUB:
            np.add.accumulate(rows[start:end], axis=1, out=pixels[start:end])
        elif kind in (_UP, _PAETH):
            for y in range(start, end):  # np.add.accumulate down the columns takes ten times as long
                above = pixels[y - 1] if y else np.zeros(rows.shape[1], np.uint8)
                if kind == _UP:
                    np.add(rows[y], above, out=pixels[y])
                elif not _unfilter_binary_paeth(rows[y], above, out=pixels[y]):
                    return None
        else:
            return None
        start = end
    return pixels


def _unfilter_binary_paeth(row: np.ndarray, above: np.ndarray, out: np.ndarray) -> bool:
    """Undo Paeth's filter of a row (W,) into `out`; False unless it and the row above are of 0 and 255 only.

    Of two values, the one that Paeth predicts is that of the pixel to the left where the row above does not change,
    else that of the pixel above. So the row is a sum from the left that starts anew at each change.
    """
    np.add.accumulate(row, out=out)  # uint8, which wraps around as the filter does
    starts = np.concatenate([_FIRST, (above[1:] != above[:-1]).nonzero()[0] + 1])
    offsets = above[starts] + row[starts] - out[starts]
    for start, offset in zip(starts.tolist(), np.diff(offsets, prepend=_FIRST.astype(np.uint8)).tolist(), strict=True):
        if offset:
            out[start:] += np.uint8(offset)
    return _is_binary(above) and _is_binary(out)


def _is_binary(row: np.ndarray) -> bool:
    return bool((row + np.uint8(1)).max() <= 1)  # 255 + 1 is 0
