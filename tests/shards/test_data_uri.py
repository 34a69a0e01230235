"""Data URIs: photographs of a bounded size, and masks as layers of an outline and a pale inside."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image
from PIL.ImageColor import getrgb

from shards.data_uri import FILL_ALPHA, mask_uri, photo_uri

COLOUR = "#ffe600"


def decoded(uri: str) -> Image.Image:
    head, data = uri.split(",")
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert head == f"data:{picture.get_format_mimetype()};base64"
    return picture


def test_a_large_photograph_is_reduced_and_a_small_one_is_not():
    image = np.full((1000, 500, 3), (200, 150, 120), np.uint8)
    assert decoded(photo_uri(image, 384)).size == (192, 384)
    small = decoded(photo_uri(image[:100, :80], 384))
    assert small.size == (80, 100)
    assert np.abs(np.asarray(small).astype(int) - (200, 150, 120)).max() <= 2  # a JPEG


def test_a_mask_is_transparent_outside_pale_inside_and_opaque_on_the_outline():
    mask = np.zeros((100, 50), bool)
    mask[25:75, 10:40] = True
    layer = np.asarray(decoded(mask_uri(mask, COLOUR, 384)).convert("RGBA"))
    assert layer.shape == (384, 192, 4)
    assert layer[192, 96].tolist() == [*getrgb(COLOUR), FILL_ALPHA]
    assert layer[97, 96].tolist() == [*getrgb(COLOUR), 255]
    assert layer[2, 2, 3] == 0
    assert set(np.unique(layer[..., 3])) == {0, FILL_ALPHA, 255}


def test_an_empty_mask_is_transparent():
    layer = np.asarray(decoded(mask_uri(np.zeros((9, 9), bool), COLOUR, 384)).convert("RGBA"))
    assert layer[..., 3].max() == 0
