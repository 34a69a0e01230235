"""Data URIs: photographs and masks inside an HTML page, which then needs no other file."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from shards.geometry import mask_outline

JPEG_QUALITY = 85
FILL_ALPHA = 24
"""Opacity of the inside of a mask, of 255; its outline is opaque."""
OUTLINE_SHARE = 1 / 128
"""Width of an outline, as a share of the layer's longer side."""


def data_uri(data: bytes, kind: str) -> str:
    """Encode a file of the MIME type `kind` as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def photo_uri(image: np.ndarray, side: int) -> str:
    """Encode an image (H, W, 3) uint8 RGB as JPEG; one whose longer side is above `side` pixels is reduced to it."""
    photo, jpeg = Image.fromarray(image), io.BytesIO()
    photo.thumbnail((side, side))
    photo.save(jpeg, "JPEG", quality=JPEG_QUALITY)
    return data_uri(jpeg.getvalue(), "image/jpeg")


def mask_uri(mask: np.ndarray, colour: str, side: int) -> str:
    """Encode a mask (H, W) bool as a layer to lay over its photograph, a PNG whose longer side has `side` pixels.

    It is transparent but for the outline and a pale inside of the mask, in `colour` (#rrggbb).
    """
    height, width = (max(1, round(side * length / max(mask.shape))) for length in mask.shape)
    resized = Image.fromarray(mask.view(np.uint8)).resize((width, height), Image.Resampling.NEAREST)
    values = np.array(resized)  # (height, width): 0 outside, 1 inside, 2 on the outline
    values[mask_outline(values > 0, max(1, round(side * OUTLINE_SHARE)))] = 2
    picture, png = Image.frombytes("P", (width, height), values.tobytes()), io.BytesIO()
    picture.putpalette(bytes.fromhex(colour.removeprefix("#")) * 3)
    picture.save(png, "PNG", transparency=bytes((0, FILL_ALPHA, 255)), bits=2)
    return data_uri(png.getvalue(), "image/png")
