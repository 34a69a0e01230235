"""Write PNG files of any colour type and bit depth, which Pillow cannot write."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np

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
