"""Pictures of the report: each example as a photograph and two transparent layers, ground truth and prediction."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Self

import numpy as np
from PIL import Image

from isicdist.metrics.examples import Example
from isicdist.metrics.figures import OUTLINE_SHARE, PREDICTION, TRUTH
from shards.geometry import mask_outline

SIDE = 384
"""Longer side of the layers in pixels; larger photographs are reduced to it, so that a page of many runs is small."""
JPEG_QUALITY = 85
FILL_ALPHA = 24
"""Opacity of the inside of a mask, of 255; its outline is opaque."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One example as data URIs, which an HTML page shows without any other file."""

    example: Example
    photo: str
    mask: str
    """Transparent but for the outline and a pale inside of the ground truth."""
    prediction: str
    """The same of the prediction."""

    @classmethod
    def of(cls, example: Example) -> Self:
        """Encode an example."""
        photo = Image.fromarray(example.image)
        photo.thumbnail((SIDE, SIDE))
        encoded = io.BytesIO()
        photo.save(encoded, "JPEG", quality=JPEG_QUALITY)
        return cls(
            example=example,
            photo=data_uri(encoded.getvalue(), "image/jpeg"),
            mask=data_uri(_layer(example.mask, TRUTH), "image/png"),
            prediction=data_uri(_layer(example.prediction, PREDICTION), "image/png"),
        )


def data_uri(data: bytes, kind: str) -> str:
    """Encode a file of the MIME type `kind` as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _layer(mask: np.ndarray, colour: str) -> bytes:
    """Draw a mask (H, W) bool as a PNG whose longer side is SIDE: 0 outside, 1 inside, 2 on the outline."""
    height, width = (round(SIDE * length / max(mask.shape)) for length in mask.shape)
    picture = Image.fromarray(mask.view(np.uint8)).resize((width, height), Image.Resampling.NEAREST)
    values = np.array(picture)  # (height, width)
    values[mask_outline(values > 0, round(SIDE * OUTLINE_SHARE))] = 2
    picture = Image.frombytes("P", (width, height), values.tobytes())
    picture.putpalette(bytes.fromhex(colour.removeprefix("#")) * 3)
    png = io.BytesIO()
    picture.save(png, "PNG", transparency=bytes((0, FILL_ALPHA, 255)), bits=2)
    return png.getvalue()
