"""Normalisation that every image goes through: bytes to [0, 1], then zero mean and unit deviation per channel."""

from __future__ import annotations

import torch
from torch import Tensor

MEAN = (0.708, 0.582, 0.536)
STD = (0.157, 0.166, 0.181)
"""Of the ISIC 2018 Task 1 training images, RGB in [0, 1]."""


def to_unit(images: Tensor) -> Tensor:
    """uint8 images (B, 3, H, W) as floats of the default dtype in [0, 1]."""
    return images.to(torch.get_default_dtype()) / 255


def normalise(images: Tensor, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> Tensor:
    """Float images (B, 3, H, W) in [0, 1] -> zero mean and unit deviation over the ISIC set."""
    shape = (1, 3, 1, 1)
    return (images - images.new_tensor(mean).view(shape)) / images.new_tensor(std).view(shape)
