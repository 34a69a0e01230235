"""Test-time augmentation: the mean of what a network says of an image and of its mirrored and turned copies.

A lesion has no upside, so each symmetry of the square gives an equally good opinion. Every opinion is turned back
before the mean is taken, and probabilities are averaged, not logits: one copy that is very sure does not outvote
the others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from isicdist.config import Tta

Symmetry = tuple[int, bool]
"""Quarter turns, and whether the image is mirrored left to right before them."""

SYMMETRIES: dict[Tta, tuple[Symmetry, ...]] = {
    "off": ((0, False),),
    "flips": ((0, False), (0, True), (2, True), (2, False)),
    "d4": tuple((turns, mirrored) for turns in range(4) for mirrored in (False, True)),
}


def mean_probs(network: Callable[[Tensor], Tensor], images: Tensor, mode: Tta) -> Tensor:
    """Probabilities (B, 1, H, W) float32 in [0, 1], the mean over the symmetries of `mode`.

    `images`: (B, 3, H, W) floats, as `network` wants them; it gives logits (B, 1, H, W). One forward pass of the
    whole batch per symmetry, so the memory is that of one.
    """
    opinions = [_turned_back(network(_turned(images, way)).float().sigmoid(), way) for way in SYMMETRIES[mode]]
    return torch.stack(opinions).mean(dim=0)


def _turned(images: Tensor, symmetry: Symmetry) -> Tensor:
    turns, mirrored = symmetry
    return torch.rot90(images.flip(-1) if mirrored else images, turns, dims=(-2, -1))


def _turned_back(probs: Tensor, symmetry: Symmetry) -> Tensor:
    turns, mirrored = symmetry
    back = torch.rot90(probs, -turns, dims=(-2, -1))
    return back.flip(-1) if mirrored else back
