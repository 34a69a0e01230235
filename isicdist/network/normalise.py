"""Normalisation of the network's input: bytes to [0, 1], then zero mean and unit standard deviation per channel."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

MEAN = (0.708, 0.582, 0.536)
"""Mean of each channel over the ISIC 2018 Task 1 training images, RGB in [0, 1]."""
STD = (0.157, 0.166, 0.181)
"""Standard deviation of each channel over the same images."""


def to_unit(images: Tensor) -> Tensor:
    """Convert uint8 images (B, 3, H, W) to floats of the default dtype in [0, 1]."""
    return images.to(torch.get_default_dtype()) / 255


def normalise(images: Tensor, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> Tensor:
    """Subtract `mean` from float images (B, 3, H, W) in [0, 1], and divide by `std`, per channel."""
    # A tracer (torch.export, torch.compile) would leave its own fake tensors in the cache.
    constant = _constant.__wrapped__ if torch.compiler.is_compiling() else _constant
    return (images - constant(mean, images.device, images.dtype)) / constant(std, images.device, images.dtype)


@functools.lru_cache(maxsize=16)
def _constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Make a constant (1, 3, 1, 1) on the device, once: to make it from a list waits for the device."""
    with torch.inference_mode(False):  # a cached tensor outlives the mode it is made in
        return torch.tensor(values, dtype=dtype).view(1, 3, 1, 1).to(device)
