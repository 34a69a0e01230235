"""Decode odd and damaged JPEGs: the pixels that Pillow sees, or an error."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from shards.jpeg import MAX_STRAY_BYTES, decode_jpeg, jpeg_size
from tests.shards.conftest import photograph
from tests.shards.inputs.pictures import damaged_jpegs, jpeg_bytes, odd_jpegs

NOISE = np.random.default_rng(0).normal(0, 8, (120, 171, 3))
PICTURE = np.clip(photograph(1, 120, 171) + NOISE, 0, 255).astype(np.uint8)
ODD, DAMAGED = odd_jpegs(PICTURE), damaged_jpegs(PICTURE)
LEVELS = [np.random.default_rng(n).integers(-60, 60, (7, 9)) for n in range(3)]


def pillow(jpeg: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(jpeg)) as picture:
        return np.asarray(picture.convert("RGB"))


@pytest.mark.parametrize("name", ODD)
def test_an_odd_jpeg_has_the_pixels_that_pillow_sees(name: str):
    np.testing.assert_array_equal(decode_jpeg(ODD[name]), pillow(ODD[name]))
    assert jpeg_size(memoryview(ODD[name])) == (120, 171)
    out = np.zeros((120, 171, 3), np.uint8)
    assert (decode_jpeg(memoryview(ODD[name]), out) == pillow(ODD[name])).all()
    assert (out == pillow(ODD[name])).all()
    assert decode_jpeg(ODD[name], min_size=(1, 1)).shape == (15, 22, 3)


@pytest.mark.parametrize("size", [(61, 83), (1, 1)])
@pytest.mark.parametrize(
    "factors",
    [
        *([luma, (1, 1), (1, 1)] for luma in [(1, 1), (2, 1), (2, 2), (1, 2), (4, 1), (1, 4), (3, 1), (1, 3), (4, 2)]),
        [(2, 4), (1, 1), (1, 1)],
        [(3, 2), (1, 1), (1, 1)],
        [(2, 2), (2, 1), (1, 2)],
        [(1, 1), (2, 2), (1, 1)],
        [(2, 1), (2, 1), (2, 1)],
    ],
)
def test_any_sampling_factors_give_the_pixels_that_pillow_sees(factors: list[tuple[int, int]], size: tuple[int, int]):
    jpeg = jpeg_bytes(LEVELS, factors, size)
    np.testing.assert_array_equal(decode_jpeg(jpeg), pillow(jpeg))
    with pytest.raises(ValueError, match="truncated"):
        decode_jpeg(jpeg[:-10])


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_jpeg_is_refused_at_any_scale(name: str):
    for min_size in ((0, 0), (1, 1)):
        with pytest.raises(ValueError, match=r"truncated|remature end|extraneous bytes|Huffman"):
            decode_jpeg(DAMAGED[name], min_size=min_size)


def test_overwritten_data_never_pass_as_padding():
    """Of 300 files overwritten at random, each is refused, or self-synchronised: libjpeg itself has no warning."""
    jpeg = DAMAGED["no end"] + b"\xff\xd9"
    random, start = np.random.default_rng(0), jpeg.index(b"\xff\xda") + 14
    refused = 0
    for _ in range(300):
        at, length = int(random.integers(start, len(jpeg) - 300)), int(random.integers(1, 200))
        damaged = jpeg[:at] + random.bytes(length).replace(b"\xff", b"\0") + jpeg[at + length :]
        try:
            found = decode_jpeg(damaged)
        except ValueError:
            refused += 1
        else:
            np.testing.assert_array_equal(found, pillow(damaged))
            with pytest.raises(ValueError, match="extraneous"):  # there is nothing to repair in it
                decode_jpeg(damaged[:-2] + b"stray" * (MAX_STRAY_BYTES // 2) + damaged[-2:])
    assert refused > 120


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"\xff\xd8\xff\xd9", b"GIF89a" * 9, b"\xff\xd8\xff\xc0\xff\xd9"])
def test_what_is_no_jpeg_is_a_value_error(data: bytes):
    with pytest.raises(ValueError):  # noqa: PT011  libjpeg's words
        decode_jpeg(data)
    with pytest.raises(ValueError, match="no JPEG"):
        jpeg_size(data)
