"""Pictures of the report: each example as a photograph and two transparent layers, ground truth and prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from isicdist.metrics.examples import PREDICTION_COLOUR, TRUTH_COLOUR, Example
from shards.data_uri import mask_uri, photo_uri

SIDE = 384
"""Longer side of the layers in pixels; larger photographs are reduced to it, so that a page of many runs is small."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One example as data URIs."""

    example: Example
    photo: str
    mask: str
    """Layer of the ground truth."""
    prediction: str
    """Layer of the prediction."""

    @classmethod
    def of(cls, example: Example) -> Self:
        """Encode an example."""
        return cls(
            example=example,
            photo=photo_uri(example.image, SIDE),
            mask=mask_uri(example.mask, TRUTH_COLOUR, SIDE),
            prediction=mask_uri(example.prediction, PREDICTION_COLOUR, SIDE),
        )
