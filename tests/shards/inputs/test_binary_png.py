"""The decoder of black-and-white PNGs gives Pillow's pixels for every filter, or leaves the file to Pillow."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shards.inputs.binary_png import decode_binary_png

RNG = np.random.default_rng(0)


def filtered(pixels: np.ndarray, kinds: list[int]) -> bytes:
    """A PNG of `pixels` (H, W), its rows filtered as `kinds` says (PNG specification, section 9)."""
    rows, above = b"", [0] * pixels.shape[1]
    for kind, row in zip(kinds, pixels.tolist(), strict=True):
        rows += bytes([kind])
        for x, value in enumerate(row):
            a, b, c = (row[x - 1] if x else 0), above[x], (above[x - 1] if x else 0)
            paeth = min((abs(b - c), 0, a), (abs(a - c), 1, b), (abs(a + b - 2 * c), 2, c))[2]
            rows += bytes([(value - (0, a, b, (a + b) // 2, paeth)[kind]) % 256])
        above = row
    header = struct.pack(">II", *pixels.shape[::-1]) + bytes((8, 0, 0, 0, 0))
    body = zlib.compress(rows)
    chunks = (b"IHDR" + header, b"IDAT" + body[:7], b"IDAT" + body[7:], b"IEND")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


def turned() -> bytes:
    """A grey PNG with an EXIF orientation."""
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 3
    Image.new("L", (5, 4)).save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


@settings(deadline=None)
@given(data=st.data(), width=st.integers(1, 9), height=st.integers(1, 9))
def test_every_filter_is_undone(data: st.DataObject, width: int, height: int):
    values = st.sampled_from([0, 255])
    pixels = np.array(data.draw(st.lists(values, min_size=width * height, max_size=width * height)), np.uint8)
    kinds = data.draw(st.lists(st.sampled_from([0, 1, 2, 4]), min_size=height, max_size=height))
    png = filtered(pixels.reshape(height, width), kinds)
    decoded = decode_binary_png(png)
    assert decoded is not None
    np.testing.assert_array_equal(decoded, pixels.reshape(height, width))
    np.testing.assert_array_equal(decoded, by_pillow(png))


@pytest.mark.parametrize(
    "png",
    [
        filtered(RNG.integers(0, 256, (4, 5), dtype=np.uint8), [0, 3, 0, 0]),
        *(filtered(RNG.integers(0, 256, (4, 5), dtype=np.uint8), [0, kind, 0, 0]) for kind in (0, 1, 2, 4)),
        filtered(RNG.integers(0, 2, (20, 2000), dtype=np.uint8) * np.uint8(255), [2] * 20),
        filtered(np.zeros((4, 5), np.uint8), [0, 0, 0, 0])[:-20],
        filtered(np.zeros((4, 5), np.uint8), [0, 0, 0, 0]).replace(b"IEND", b"IENd"),
        filtered(np.zeros((4, 5), np.uint8), [0, 0, 0, 0]).replace(struct.pack(">II", 5, 4), struct.pack(">II", 5, 3)),
        filtered(np.zeros((70_000, 1), np.uint8), [2] * 70_000),
        b"",
        turned(),
    ],
)
def test_the_others_are_for_pillow(png: bytes):
    assert decode_binary_png(png) is None


def test_a_flipped_bit_anywhere_never_gives_other_pixels():
    pixels = RNG.integers(0, 2, (6, 20), dtype=np.uint8) * np.uint8(255)
    png = filtered(pixels, [0, 1, 2, 4, 0, 2])
    for bit in range(8 * len(png)):
        damaged = bytearray(png)
        damaged[bit // 8] ^= 1 << bit % 8
        decoded = decode_binary_png(bytes(damaged))
        assert decoded is None or np.array_equal(decoded, pixels)


def test_the_real_masks_are_decoded(real_data: Path):
    for path in sorted((real_data / "isic-original" / "masks").glob("*.png")):
        decoded = decode_binary_png(path.read_bytes())
        assert decoded is not None
        np.testing.assert_array_equal(decoded, by_pillow(path.read_bytes()))
