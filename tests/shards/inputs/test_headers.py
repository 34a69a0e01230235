"""A header read without decoding says what Pillow says, or nothing."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from shards.inputs.binary_png import decode_binary_png
from shards.inputs.headers import plain_jpeg, plain_png

RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8))


def saved(picture: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"optimize": True}, {"comment": b"c" * 300}]
)
def test_a_plain_jpeg_has_its_size(options: dict[str, Any]):
    assert plain_jpeg(saved(RGB, quality=95, **options)) == (300, 200)


def with_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 1
    return saved(RGB, exif=exif)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        saved(RGB, "PNG"),
        saved(RGB.convert("L")),
        saved(RGB.convert("CMYK")),
        saved(RGB, icc_profile=b"p" * 40),
        with_exif(),
        saved(RGB)[:-2],
        saved(RGB) + b"\0",
        saved(RGB)[:100] + b"\xff\xd9",
        saved(RGB).replace(b"\xff\xdb", b"\xff\xff\xdb", 1),
    ],
    ids=["empty", "png", "grey", "cmyk", "profile", "exif", "torn", "longer", "headers torn", "fill byte"],
)
def test_of_any_other_nothing_is_said(data: bytes):
    assert plain_jpeg(data) is None


def test_a_jpeg_of_too_many_pixels_is_not_plain():
    jpeg = bytearray(saved(RGB))
    frame = jpeg.index(b"\xff\xc0")
    assert plain_jpeg(bytes(jpeg)) == (300, 200)
    jpeg[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    assert plain_jpeg(bytes(jpeg)) is None


@pytest.mark.parametrize("mode", ["1", "L"])
def test_a_plain_png_has_its_size_and_one_with_a_flipped_bit_has_none(mode: str):
    png = bytearray(saved(RGB.convert(mode), "PNG"))
    assert plain_png(bytes(png)) == (300, 200)
    png[png.index(b"IDAT") + 9] ^= 1
    assert plain_png(bytes(png)) is None
    assert plain_png(saved(RGB.convert("P"), "PNG")) is None


def test_a_png_that_a_text_may_turn_is_not_plain():
    grey = RGB.convert("L")
    for keyword, plain in (("Comment", True), ("XML:com.adobe.xmp", False), ("Raw profile type exif", False)):
        texts = PngInfo()
        texts.add_itxt(keyword, '<rdf:Description tiff:Orientation="3"/>')
        assert (plain_png(saved(grey, "PNG", pnginfo=texts)) is not None) is plain
        assert (decode_binary_png(saved(grey.convert("1").convert("L"), "PNG", pnginfo=texts)) is not None) is plain


def test_the_real_photographs_are_plain(real_data: Path):
    for path in (real_data / "isic-original" / "images").glob("*.jpg"):
        with Image.open(path) as picture:
            assert plain_jpeg(path.read_bytes()) == picture.size
