"""Read the size of a plain JPEG or PNG from its headers, without decoding it.

A pair can be copied as it is where both of its pictures are plain: upright, in the colours expected, and whole as far
as this can be told without decoding. All others get None, and are decoded by Pillow, which names what is wrong.
"""

from __future__ import annotations

import struct

from isal import isal_zlib

from shards import codecs
from shards.jpeg import JPEG_END, JPEG_START

_FRAMES = frozenset(b"\xc0\xc1\xc2")  # baseline, extended and progressive; the others are lossless or hierarchical
_PROGRESSIVE, _QUANTIZATION, _SCAN = 0xC2, 0xDB, 0xDA
# Sampling factors of luma, 16 * horizontal + vertical, next to which the colours have 1 x 1: all that cameras use.
_LUMA_FACTORS = frozenset(b"\x11\x21\x22\x12\x41")
# Huffman and quantization tables, restart interval, APP0 (JFIF) and comment: nothing that turns or recolours a picture.
_TABLES = frozenset(b"\xc4\xdb\xdd\xe0\xfe")

# Chunks that change how a pixel of a PNG is read or turn it: with these keywords a text has EXIF or XMP in it.
_REFUSED = (b"PLTE", b"tRNS", b"eXIf")
_TEXTS, _TURNING = (b"tEXt", b"zTXt", b"iTXt"), (b"Raw profile type", b"XML:com.adobe.xmp")


def plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """(width, height) of an 8-bit JPEG of three colours that has an end and no EXIF or XMP; else None.

    The headers are followed up to the first scan (ITU-T T.81, annex B); a JPEG with a colour profile, an unknown
    segment, unusual sampling factors or irregular scan parameters gets None, too.
    """
    if data[:2] != JPEG_START or data[-2:] != JPEG_END:
        return None
    start, size = 2, None
    seen: set[int] = set()
    while len(head := data[start : start + 10]) == 10 and head[0] == 0xFF:
        kind, end = head[1], start + 2 + int.from_bytes(head[2:4], "big")
        if kind == _SCAN:
            last_coefficient = 0 if _PROGRESSIVE in seen else 63
            regular = data[end - 3 : end - 1] == bytes((0, last_coefficient)) and _QUANTIZATION in seen
            return size if regular else None
        if kind in _FRAMES and size is None and head[4] == 8 and head[9] == 3:  # bits, colours
            height, width = struct.unpack(">HH", head[5:9])
            factors = data[start + 11 : end : 3]
            if not 0 < height * width <= codecs.MAX_PIXELS:
                return None
            if factors[1:] != b"\x11\x11" or factors[0] not in _LUMA_FACTORS:
                return None
            size = width, height
        elif kind not in _TABLES:
            return None
        seen.add(kind)
        start = end
    return None


def plain_png(data: bytes) -> tuple[int, int] | None:
    """(width, height) of an upright 1-bit or 8-bit grey PNG of `plain_chunks` with nothing behind them; else None."""
    if data[:16] != codecs.PNG_START or data[24:26] not in (b"\1\0", b"\x08\0"):
        return None
    chunks = plain_chunks(data)
    if chunks is None or chunks[-1][2] + 4 != len(data):
        return None
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def plain_chunks(data: bytes) -> list[tuple[bytes, int, int]] | None:
    """List the chunks of a PNG up to its end: their type, and the start and end of what they hold.

    None where a chunk is damaged or missing, changes how a pixel is read (a palette, transparency), or may turn the
    picture (EXIF or XMP, also as a text).
    """
    start, chunks = 8, []
    while len(head := data[start : start + 8]) == 8:
        end = start + 8 + int.from_bytes(head[:4], "big")
        if head[4:] in _REFUSED or (head[4:] in _TEXTS and data.startswith(_TURNING, start + 8)):
            return None
        if isal_zlib.crc32(data[start + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return None
        chunks.append((head[4:], start + 8, end))
        if head[4:] == b"IEND":
            return chunks
        start = end + 4
    return None
