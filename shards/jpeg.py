"""Decode JPEGs strictly: read past oddities that cost no pixel, refuse damaged data.

libjpeg warns of both and decodes on; simplejpeg makes an error of every warning. Where it does, the known oddities are
repaired, and the repaired file must decode without a warning:
- scan parameters that a sequential JPEG must not have ("Invalid SOS parameters"), as some phones write them
- stray bytes between two segments, and padding after the entropy-coded data ("extraneous bytes before marker")
- an unknown version of JFIF, an unknown Adobe colour transform, and a broken colour profile

Overwritten data mostly ends too early or too late, and too late looks like padding. So only bytes of one value pass as
padding, or at most MAX_STRAY_BYTES of any: one MCU (the blocks that are coded together) of a photograph takes more.

TurboJPEG does not read unusual sampling factors (3 x 1, 4 x 2, colour finer than luma); such a JPEG is decoded by
Pillow, which reports where it is cut, but no overwritten data.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import simplejpeg

JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
MAX_STRAY_BYTES = 8
MIN_PADDING = 3  # bytes of one value
_MARKER = re.compile(rb"\xff([^\x00\xff])")  # 0xFF 0x00 is a data byte; before a marker there may be more 0xFF
_FRAMES = frozenset(range(0xC0, 0xD0)) - frozenset(b"\xc4\xc8\xcc")
_SEQUENTIAL_FRAMES = frozenset(b"\xc0\xc1\xc9")
_RESTARTS = frozenset(range(0xD0, 0xD8))
_WITHOUT_LENGTH = _RESTARTS | frozenset(b"\x01\xd8")
_SCAN, _END, _JFIF, _PROFILE, _ADOBE = 0xDA, 0xD9, 0xE0, 0xE2, 0xEE
_SEQUENTIAL_SCAN = bytes((0, 63, 0))  # first and last coefficient, and bit position
_YCBCR = 1  # Adobe's colour transform
_UNKNOWN_SAMPLING = "subsampling level"


class _Segment(NamedTuple):
    """A marker segment, and the entropy-coded data that follow it."""

    kind: int
    body: bytes
    """Without marker and length."""
    data: bytes
    """Up to the next marker; empty except after a scan header or a restart marker."""


def decode_jpeg(
    data: bytes | memoryview, out: np.ndarray | None = None, min_size: tuple[int, int] = (0, 0)
) -> np.ndarray:
    """Decode a JPEG of any colours to (H, W, 3) uint8 RGB, into `out` (contiguous) if given.

    `min_size` is the least (height, width) in pixels to which it may be scaled when decoded; (0, 0): not at all. Raises
    ValueError for damaged or truncated data, for bytes that are no JPEG, and where `out` is too small.
    """
    try:
        return _decode(data, out, min_size)
    except ValueError as error:
        data = bytes(data)
        if data[:2] != JPEG_START:
            raise
        if not data.rstrip(b"\0").endswith(JPEG_END):
            raise ValueError(f"truncated: no end of image after {len(data)} bytes") from error
        for repaired in _repairs(data):
            try:
                return _decode(repaired, out, min_size)
            except ValueError as other:
                if _UNKNOWN_SAMPLING in str(other):
                    return _decode_by_pillow(repaired, out)
        raise


def jpeg_size(data: bytes | memoryview) -> tuple[int, int]:
    """(height, width) in pixels of a JPEG, from its frame header. Raises ValueError when it has none."""
    if data[:2] == JPEG_START:
        for segment in _segments(data):
            if segment.kind in _FRAMES and len(segment.body) >= 5:
                return int.from_bytes(segment.body[1:3], "big"), int.from_bytes(segment.body[3:5], "big")
            if segment.kind == _SCAN:
                break
    raise ValueError("no JPEG, or one without a frame header")


def _decode(data: bytes | memoryview, out: np.ndarray | None, min_size: tuple[int, int]) -> np.ndarray:
    height, width = min_size
    return simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width, fastdct=False, buffer=out)


def _decode_by_pillow(data: bytes, out: np.ndarray | None) -> np.ndarray:
    """Decode in full by Pillow. Raises ValueError."""
    from PIL import Image  # late: a loader of resized sets never needs its memory

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged EXIF tags
            with Image.open(io.BytesIO(data), formats=["JPEG"]) as picture:
                if picture.size[::-1] != jpeg_size(data):  # Pillow reads the last one, and the first was checked
                    raise ValueError("two frame headers of different sizes")
                pixels = np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from error
    if out is None or out.shape != pixels.shape:
        return pixels
    out[:] = pixels
    return out


def _segments(data: bytes | memoryview) -> Iterator[_Segment]:
    """Divide a JPEG into its segments, up to the end of the image; stray bytes between them are left out."""
    position = 2
    while (marker := _MARKER.search(data, position)) and marker[1][0] != _END:
        kind, position, body = marker[1][0], marker.end(), b""
        if kind not in _WITHOUT_LENGTH:
            end = position + max(int.from_bytes(data[position : position + 2], "big"), 2)
            body, position = bytes(data[position + 2 : end]), end
        entropy_coded = b""
        if kind == _SCAN or kind in _RESTARTS:
            following = _MARKER.search(data, position)
            end = following.start() if following else len(data)
            entropy_coded, position = bytes(data[position:end]), end
        yield _Segment(kind, body, entropy_coded)


def _repairs(data: bytes) -> Iterator[bytes]:
    """Yield repaired copies of a JPEG: with regular headers; then without padding, and without a few stray bytes."""
    segments: list[_Segment] = []
    frame = 0
    for segment in _segments(data):
        if segment.kind in _FRAMES:
            frame = segment.kind
        if segment.kind != _PROFILE:
            segments.append(segment._replace(body=_regular(segment, frame)))
    yield _joined(segments)
    for remaining in (1, 0):  # bytes of the padding: its value may be that of the last byte of the data
        yield _joined([segment._replace(data=_without_padding(segment.data, remaining)) for segment in segments])
    *others, last = segments or [_Segment(_END, b"", b"")]
    for stray in range(1, min(MAX_STRAY_BYTES, len(last.data)) + 1):
        yield _joined([*others, last._replace(data=last.data[:-stray])])


def _regular(segment: _Segment, frame: int) -> bytes:
    """The body of a segment, its irregular header values replaced by those that libjpeg assumes."""
    kind, body = segment.kind, segment.body
    if kind == _SCAN and frame in _SEQUENTIAL_FRAMES:
        return body[:-3] + _SEQUENTIAL_SCAN
    if kind == _JFIF and body[:5] == b"JFIF\0" and len(body) > 5:
        return body[:5] + b"\1" + body[6:]
    if kind == _ADOBE and body[:5] == b"Adobe" and len(body) > 11 and body[11] > 2:
        return body[:11] + bytes((_YCBCR,)) + body[12:]
    return body


def _without_padding(data: bytes, remaining: int) -> bytes:
    """Entropy-coded data without the bytes of one value at their end, but for `remaining` of them."""
    length = len(data) - len(data.rstrip(data[-1:]))
    return data if length < MIN_PADDING else data[: len(data) - length + remaining]


def _joined(segments: list[_Segment]) -> bytes:
    """The bytes of a JPEG of these segments."""
    pieces = [JPEG_START]
    for kind, body, data in segments:
        pieces.append(bytes((0xFF, kind)))
        if kind not in _WITHOUT_LENGTH:
            pieces += [(len(body) + 2).to_bytes(2, "big"), body]
        pieces.append(data)
    return b"".join([*pieces, JPEG_END])
