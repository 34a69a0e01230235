"""Pictures of the report: an example as a photograph and a layer for each mask, all of one shape."""

from __future__ import annotations

import numpy as np

from isicdist.metrics.examples import PREDICTION_COLOUR, TRUTH_COLOUR, Example
from isicdist.report.gallery import SIDE, Picture
from shards.data_uri import mask_uri, photo_uri


def test_an_example_is_a_photograph_and_two_layers():
    mask = np.zeros((100, 50), bool)
    mask[25:75, 10:40] = True
    image = np.full((100, 50, 3), (200, 150, 120), np.uint8)
    example = Example(
        group="worst",
        key="ISIC_1",
        dice=0.5,
        lesion_area=0.3,
        aspect_ratio=0.5,
        image=image,
        mask=mask,
        prediction=~mask,
    )
    picture = Picture.of(example)
    assert picture.photo == photo_uri(image, SIDE)
    assert picture.mask == mask_uri(mask, TRUTH_COLOUR, SIDE)
    assert picture.prediction == mask_uri(~mask, PREDICTION_COLOUR, SIDE)
