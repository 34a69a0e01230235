"""Test-time augmentation (TTA): average the probabilities of an image over flipped and rotated copies of it.

A dermoscopic photograph has no upright orientation, so that each of the 8 symmetries of the square (the dihedral group
D4) is as likely. Each prediction is transformed back before the mean. Probabilities are averaged, not logits, so that
one very confident copy does not outweigh the others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from isicdist.config import Tta

Symmetry = tuple[int, bool]
"""Number of anticlockwise quarter turns, and whether the image is flipped left to right before them."""

SYMMETRIES: dict[Tta, tuple[Symmetry, ...]] = {
    "off": ((0, False),),
    "flips": ((0, False), (0, True), (2, True), (2, False)),
    "d4": tuple((turns, mirrored) for turns in range(4) for mirrored in (False, True)),
}


def mean_probs(network: Callable[[Tensor], Tensor], images: Tensor, mode: Tta) -> Tensor:
    """Predict probabilities (B, 1, H, W) float32 in [0, 1], averaged over the symmetries of `mode`.

    `network` maps `images` (B, 3, H, W) to logits (B, 1, H, W). It is called once per symmetry with the whole batch,
    so that the peak of memory is that of one forward pass.
    """
    predictions = [
        _invert(network(_transform(images, symmetry)).float().sigmoid(), symmetry) for symmetry in SYMMETRIES[mode]
    ]  # (B, 1, H, W) each
    return torch.stack(predictions).mean(dim=0)


def _transform(images: Tensor, symmetry: Symmetry) -> Tensor:
    """Flip and rotate: (B, C, H, W) -> the same, or (B, C, W, H) for an odd number of quarter turns."""
    turns, flipped = symmetry
    return torch.rot90(images.flip(-1) if flipped else images, turns, dims=(-2, -1))


def _invert(probs: Tensor, symmetry: Symmetry) -> Tensor:
    """Undo `_transform`."""
    turns, flipped = symmetry
    upright = torch.rot90(probs, -turns, dims=(-2, -1))
    return upright.flip(-1) if flipped else upright
