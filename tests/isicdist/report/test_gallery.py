"""Pictures of the report: layers that are transparent outside, pale inside and opaque on the outline."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image
from PIL.ImageColor import getrgb

from isicdist.metrics.examples import Example
from isicdist.metrics.figures import PREDICTION, TRUTH
from isicdist.report.gallery import FILL_ALPHA, SIDE, Picture


def decoded(uri: str) -> Image.Image:
    head, data = uri.split(",")
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert head == f"data:{picture.get_format_mimetype()};base64"
    return picture


def test_an_example_is_a_photograph_and_two_layers():
    mask = np.zeros((1000, 500), bool)
    mask[250:750, 100:400] = True
    image = np.full((1000, 500, 3), (200, 150, 120), np.uint8)
    example = Example(
        group="worst",
        key="ISIC_1",
        dice=0.5,
        lesion_area=0.3,
        aspect_ratio=0.5,
        image=image,
        mask=mask,
        prediction=np.zeros_like(mask),
    )
    picture = Picture.of(example)
    photo, truth, prediction = (decoded(uri) for uri in (picture.photo, picture.mask, picture.prediction))
    assert photo.size == truth.size == prediction.size == (SIDE // 2, SIDE)
    layer = np.asarray(truth.convert("RGBA"))
    assert (layer[..., 3][layer[..., 3] > 0].min(), layer[..., 3].max()) == (FILL_ALPHA, 255)
    assert layer[SIDE // 2, SIDE // 4].tolist() == [*getrgb(TRUTH), FILL_ALPHA]  # inside
    assert layer[SIDE // 4 + 1, SIDE // 4].tolist() == [*getrgb(TRUTH), 255]  # on the outline
    assert layer[2, 2, 3] == 0
    assert np.asarray(prediction.convert("RGBA"))[..., 3].max() == 0
    assert TRUTH != PREDICTION
