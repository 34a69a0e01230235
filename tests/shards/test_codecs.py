"""Encode and decode images and masks: the same pixels by every decoder, also into preallocated memory."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from shards import codecs

masks = st.tuples(st.integers(1, 70), st.integers(1, 70), st.integers(0, 9)).map(
    lambda of: np.random.default_rng(of[2]).random(of[:2]) < of[2] / 9
)


def pillow_png(mask: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG", **options)
    return buffer.getvalue()


@pytest.fixture
def no_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("decoded by Pillow")

    monkeypatch.setattr(Image, "open", refuse)


@given(masks)
def test_every_reader_of_png_sees_the_same_mask(mask):
    data = codecs.encode_mask(mask)
    with Image.open(io.BytesIO(data)) as picture:  # checks the chunks' checksums, too
        assert picture.mode == "1"
        assert (np.asarray(picture) == mask).all()
    assert (codecs.decode_mask(data) == mask).all()
    assert (codecs.decode_mask(pillow_png(mask)) == mask).all()


@pytest.mark.usefixtures("no_pillow")
def test_masks_of_encode_mask_are_decoded_without_pillow():
    mask = np.tri(30, 44, dtype=np.uint8)
    out = np.full((30, 44), 7, np.uint8)
    assert codecs.decode_mask(memoryview(codecs.encode_mask(mask)), out) is out
    assert (out == mask).all()


def test_a_filtered_mask_is_read_into_memory_too():
    mask = np.tri(300, 200, dtype=bool)
    out = np.full(mask.shape, 7, np.uint8)
    codecs.decode_mask(pillow_png(mask), out)
    assert (out == mask).all()


def test_a_mask_of_another_layout_is_read_by_pillow(monkeypatch):
    monkeypatch.setattr(ImageFile, "MAXBLOCK", 64)
    mask = np.random.default_rng(0).random((60, 60)) < 0.5
    data = pillow_png(mask)
    assert data.count(b"IDAT") > 1
    assert (codecs.decode_mask(data) == mask).all()


@pytest.mark.parametrize("size", [(10, 20), (20, 20), (40, 10)])
def test_an_image_of_another_size_is_refused(size):
    with pytest.raises(ValueError, match=r"pixels|buffer"):
        codecs.decode_image(codecs.encode_image(np.zeros((*size, 3), np.uint8)), np.zeros((20, 10, 3), np.uint8))
    with pytest.raises(ValueError, match="pixels, not 10 × 20"):
        codecs.decode_mask(codecs.encode_mask(np.zeros(size, np.uint8)), np.zeros((20, 10), np.uint8))


def test_an_image_is_decoded_into_a_given_array():
    image = np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    batch = np.zeros((2, 32, 48, 3), np.uint8)
    data = codecs.encode_image(image)
    codecs.decode_image(memoryview(data), batch[1])
    assert (batch[1] == codecs.decode_image(data)).all()
    assert not batch[0].any()


@pytest.mark.parametrize("cut", [0, 7, 20, 38, 45, 60])
def test_a_cut_mask_is_refused(cut):
    data = codecs.encode_mask(np.tri(30, 44, dtype=np.uint8))
    with pytest.raises((OSError, ValueError, SyntaxError)):
        codecs.decode_mask(data[:cut])


def test_a_mask_that_claims_more_pixels_than_it_has_is_refused():
    data = bytearray(codecs.encode_mask(np.tri(30, 44, dtype=np.uint8)))
    data[20:24] = (2**31).to_bytes(4, "big")
    with pytest.raises((OSError, ValueError, SyntaxError)):
        codecs.decode_mask(bytes(data))


def test_damaged_pixels_of_a_mask_are_refused():
    data = bytearray(codecs.encode_mask(np.random.default_rng(0).random((30, 44)) < 0.5))
    data[60:80] = bytes(20)
    with pytest.raises((OSError, ValueError, SyntaxError)):
        codecs.decode_mask(bytes(data))
