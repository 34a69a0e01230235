"""Read the size of a plain JPEG or PNG from its headers, without decoding it.

A pair can be copied as it is where both of its pictures are plain: upright, in the colours expected, and whole as far
as this can be told without decoding. All others get None, and are decoded by Pillow, which names what is wrong.
"""

from __future__ import annotations

import struct

from isal import isal_zlib

from shards import codecs
from shards.jpeg import JPEG_END, JPEG_START

HEAD, TAIL = 1 << 14, 1 << 10
"""Bytes that are read at the start and at the end of a picture: more than the headers of a plain one."""
_FRAMES = frozenset(b"\xc0\xc1\xc2")  # baseline, extended and progressive; the others are lossless or hierarchical
_PROGRESSIVE, _QUANTIZATION, _SCAN = 0xC2, 0xDB, 0xDA
# Sampling factors of luma, 16 * horizontal + vertical, next to which the colours have 1 x 1: all that cameras use.
_LUMA_FACTORS = frozenset(b"\x11\x21\x22\x12\x41")
# Huffman and quantization tables, restart interval, APP0 (JFIF) and comment: nothing that turns or recolours a picture.
_TABLES = frozenset(b"\xc4\xdb\xdd\xe0\xfe")


def ends_of(data: bytes) -> bytes:
    """The first HEAD and the last TAIL bytes of a picture; all of a shorter one."""
    return data if len(data) <= HEAD + TAIL else data[:HEAD] + data[-TAIL:]


def plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """(width, height) of an 8-bit JPEG of three colours that has an end and no EXIF or XMP; else None.

    `data`: the JPEG, or its ends. The headers are followed up to the first scan (ITU-T T.81, annex B); one with a
    colour profile, an unknown segment, unusual sampling factors or irregular scan parameters gets None, too.
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
    """(width, height) of a 1-bit or 8-bit grey PNG in which every chunk has its CRC-32; else None.

    One with a palette, transparency or EXIF gets None, too: they change how it is decoded.
    """
    if data[:16] != codecs.PNG_START or data[24:26] not in (b"\1\0", b"\x08\0"):
        return None
    start, refused = 8, (b"PLTE", b"tRNS", b"eXIf")
    while len(head := data[start : start + 8]) == 8:
        end = start + 8 + int.from_bytes(head[:4], "big")
        if head[4:] in refused or isal_zlib.crc32(data[start + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return None
        if head[4:] == b"IEND":
            width, height = struct.unpack(">II", data[16:24])
            return (width, height) if end + 4 == len(data) else None
        start = end + 4
    return None
