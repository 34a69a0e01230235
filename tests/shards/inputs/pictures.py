"""Write PNG files of any colour type and bit depth and odd or damaged JPEG files, which Pillow cannot write."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

_COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # by number of channels


def png_bytes(values: np.ndarray, *, bits: int = 16, interlaced: bool = False) -> bytes:
    """A PNG of samples (H, W) or (H, W, C): grey, grey and alpha, RGB, or RGB and alpha; 8 or 16 bits per sample."""
    values = values.reshape(*values.shape[:2], -1).astype(">u2" if bits == 16 else np.uint8)
    height, width, channels = values.shape
    # An interlaced file (Adam7) has seven reduced pictures: rows and columns from a start, by a step.
    passes = [(0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1)]
    parts = [values[top::down, left::right] for top, down, left, right in passes] if interlaced else [values]
    rows = b"".join(b"\0" + row.tobytes() for part in parts if part.size for row in part)
    header = struct.pack(">IIBBBBB", width, height, bits, _COLOUR_TYPES[channels], 0, 0, interlaced)
    chunks = (b"IHDR" + header, b"IDAT" + zlib.compress(rows), b"IEND")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


def write_png(path: Path, values: np.ndarray, *, bits: int = 16) -> None:
    """Write `png_bytes` to a file."""
    path.write_bytes(png_bytes(values, bits=bits))


def jpeg_bytes(levels: Sequence[np.ndarray], factors: Sequence[tuple[int, int]], size: tuple[int, int]) -> bytes:
    """A baseline JPEG of YCbCr with any sampling factors (horizontal, vertical), flat in each block of 8 x 8 samples.

    `levels`: for each component the values (rows, columns) int from -100 to 100 around the middle, one per block.
    `size`: (height, width) in pixels.
    """
    height, width = size
    widest, tallest = (max(factor[axis] for factor in factors) for axis in (0, 1))
    frame = struct.pack(">BHHB", 8, height, width, len(levels))
    frame += b"".join(bytes((i + 1, h << 4 | v, 0)) for i, (h, v) in enumerate(factors))
    scan = bytes((len(levels), *(byte for i in range(len(levels)) for byte in (i + 1, 0)), 0, 63, 0))
    codes = bytes((0, 0, 0, 12, *[0] * 12)) + bytes(range(12))  # DC: 12 categories, each by its own 4 bits
    end_of_block = bytes((1, *[0] * 15, 0))  # AC: one symbol, by the bit 0
    segments = [(0xDB, bytes((0, *[8] * 64))), (0xC0, frame), (0xC4, b"\x00" + codes), (0xC4, b"\x10" + end_of_block)]
    bits: list[str] = []
    last = [0] * len(levels)
    for row in range(-(-height // (8 * tallest))):
        for column in range(-(-width // (8 * widest))):
            for i, (h, v) in enumerate(factors):
                for y, x in np.ndindex(v, h):
                    blocks = levels[i]
                    level = int(blocks[(row * v + y) % len(blocks), (column * h + x) % blocks.shape[1]])
                    change, last[i] = level - last[i], level
                    length = abs(change).bit_length()
                    value = change if change >= 0 else change + (1 << length) - 1
                    bits.append(f"{length:04b}" + (f"{value:0{length}b}" if length else "") + "0")
    text = "".join(bits)
    data = int(text + "1" * (-len(text) % 8), 2).to_bytes(-(-len(text) // 8)).replace(b"\xff", b"\xff\0")
    headers = b"".join(
        struct.pack(">BBH", 0xFF, kind, len(body) + 2) + body for kind, body in [*segments, (0xDA, scan)]
    )
    return b"\xff\xd8" + headers + data + b"\xff\xd9"


def _saved_jpeg(picture: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", **{"quality": 92, **options})
    return file.getvalue()


def _with_scan_parameters(jpeg: bytes, parameters: Sequence[int]) -> bytes:
    """Replace first and last coefficient and bit position of the first scan."""
    scan = jpeg.index(b"\xff\xda")
    end = scan + 2 + int.from_bytes(jpeg[scan + 2 : scan + 4], "big")
    return jpeg[: end - 3] + bytes(parameters) + jpeg[end:]


def odd_jpegs(picture: np.ndarray) -> dict[str, bytes]:
    """JPEGs of a picture (H, W, 3) that libjpeg warns of, but whose pixels are all there."""
    jpeg, progressive = _saved_jpeg(picture), _saved_jpeg(picture, progressive=True)
    restarts = _saved_jpeg(picture, restart_marker_rows=1)
    adobe = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\x09"
    profile = b"\xff\xe2\0\x20ICC_PROFILE\0\x05\x02" + bytes(16)
    files = {
        "no last coefficient": _with_scan_parameters(jpeg, (0, 0, 0)),
        "last coefficient 64": _with_scan_parameters(jpeg, (0, 64, 0)),
        "bit position": _with_scan_parameters(restarts, (0, 63, 0x11)),
        "zeros before the end": jpeg[:-2] + bytes(40) + jpeg[-2:],
        "text before the end": jpeg[:-2] + b"camera" + jpeg[-2:],
        "padded progressive scan": progressive[:-2] + b"\xaa" * 12 + progressive[-2:],
        "padding before a restart": restarts.replace(b"\xff\xd0", bytes(9) + b"\xff\xd0", 1),
        "JFIF 2": jpeg[:11] + b"\2" + jpeg[12:],
        "colour transform 9": jpeg[:2] + adobe + jpeg[20:],
        "half a colour profile": jpeg[:20] + profile + jpeg[20:],
        "fill bytes": jpeg.replace(b"\xff\xdb", b"\xff\xff\xff\xdb", 1),
        "bytes after the end": jpeg + b"\0" * 7,
    }
    for name, marker in (("tables", b"\xff\xdb"), ("frame", b"\xff\xc0"), ("scan", b"\xff\xda")):
        files[f"stray bytes before the {name}"] = jpeg.replace(marker, b"\0stray\xff\0" + marker, 1)
    return files


def damaged_jpegs(picture: np.ndarray) -> dict[str, bytes]:
    """JPEGs of a picture (H, W, 3) with pixels that are lost."""
    jpeg, middle = _saved_jpeg(picture, subsampling=0), len(_saved_jpeg(picture, subsampling=0)) // 2
    return {
        "cut": jpeg[:middle],
        "cut, and ended": jpeg[:middle] + jpeg[-2:],
        "no end": jpeg[:-2],
        "zeros to the end": jpeg[:middle] + bytes(len(jpeg) - middle),
        "zeros to the end, and ended": jpeg[:middle] + bytes(len(jpeg) - middle - 2) + jpeg[-2:],
        "overwritten with zeros": jpeg[:middle] + bytes(150) + jpeg[middle + 150 :],
        "overwritten with text": jpeg[:middle] + b"overwritten" * 40 + jpeg[middle + 440 :],
        "a piece left out": jpeg[: middle - 60] + jpeg[middle:],
        "a piece twice": jpeg[:middle] + jpeg[middle - 60 :],
    }
