"""Data augmentation of a whole batch on its device: flip, rotation, scale, elastic deformation, colour jitter.

The parameters of a sample are a pure function of its key (see `isicdist.data.order.random_keys`) and drawn on the host,
a few numbers per sample. On the device the pixels are resampled once, and the colours multiplied by one matrix. Flip,
rotation, scale, elastic deformation, contrast, gamma and brightness are those of Isensee et al. (arXiv:1802.10508,
section 2.4); hue and saturation are additions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from isicdist.config import AugmentConfig, Range
from isicdist.data.order import uniforms
from isicdist.data.upload import upload

ELASTIC_GRID = 4
"""Control points of the elastic deformation along each side."""
_SCALARS = 8
_DRAWS = _SCALARS + 2 * 2 * ELASTIC_GRID**2  # random numbers of a sample: scalars, then two per x and y of each point
# Rodrigues' rotation about the grey axis: the projection on it, and the cross product with it.
_GREY = np.full((3, 3), 1 / 3)
_CROSS = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)


Array = TypeVar("Array", np.ndarray, Tensor)


class Parameters(NamedTuple, Generic[Array]):
    """Parameters of each sample of a batch, on the host or on the device."""

    theta: Array
    """Affine map of the sampling grid, (B, 2, 3): flip, rotation and scale."""
    points: Array
    """Displacements (x, y) of the control points, in the grid's unit of half a side, (B, 2, grid, grid)."""
    contrast: Array
    """Factors about the mean of the image, (B,)."""
    brightness: Array
    """Summands, (B,)."""
    gamma: Array
    """Exponents, (B,)."""
    matrix: Array
    """Product of contrast, hue and saturation, (B, 3, 3)."""


def augment(
    images: Tensor, masks: Tensor, keys: np.ndarray, config: AugmentConfig, side: int | None = None
) -> tuple[Tensor, Tensor]:
    """Augment a batch: float images (B, 3, H, W) in [0, 1] and uint8 masks (B, 1, H, W) of 0 and 1.

    Returns both at `side` × `side` pixels (default: H × W), in the same types and ranges. `keys` (B,) int64 on the host
    decide the parameters. The mask is resampled by nearest neighbour, so that it stays binary; image and mask are
    reflected at their borders.
    """
    parameters = _upload(_draw_parameters(keys, config), images)
    return transform(images, masks, parameters, config, (side, side) if side else images.shape[2:])


def transform(
    images: Tensor, masks: Tensor, parameters: Parameters[Tensor], config: AugmentConfig, size: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Do the part of `augment` that runs on the device, without any random number; (H, W) = `size` of the result."""
    grid = _sampling_grid(parameters, config, size)  # (B, H, W, 2)
    images = F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    masks_float = masks.to(images.dtype)
    resampled = F.grid_sample(masks_float, grid, mode="nearest", padding_mode="reflection", align_corners=False)
    return _jitter_colours(images, parameters), resampled.to(masks.dtype)


def _draw_parameters(keys: np.ndarray, config: AugmentConfig) -> Parameters[np.ndarray]:
    """Draw the parameters of each sample on the host, float64: a pure function of its key."""
    draws = uniforms(keys, _DRAWS)  # (B, _DRAWS)
    rotation, scale, symmetry, contrast, brightness, gamma, hue, saturation = draws[:, :_SCALARS].T  # (B,) each
    flipped, quarter_turns = np.divmod(np.floor(8 * symmetry), 4)  # one of the 8 symmetries of the square
    angle = np.pi / 2 * quarter_turns + np.deg2rad(config.rotation) * (2 * rotation - 1)
    zoom = _log_uniform(scale, config.scale)
    sign = 1 - 2 * flipped
    sin, cos = np.sin(angle) / zoom, np.cos(angle) / zoom
    theta = np.zeros((len(draws), 2, 3))
    theta[:, 0, 0], theta[:, 0, 1] = sign * cos, -sign * sin
    theta[:, 1, 0], theta[:, 1, 1] = sin, cos
    # Box–Muller transform: two uniform numbers make a normal one, the displacement of a control point along x or y.
    u, v = draws[:, _SCALARS:].reshape(len(draws), 2, -1).transpose(1, 0, 2)
    normal = np.sqrt(-2 * np.log1p(-u)) * np.cos(2 * np.pi * v)
    # Hue rotates the colours about the grey axis, saturation scales their distance from it; greys are unchanged.
    hue_angle = np.deg2rad(config.hue) * (2 * hue[:, None, None] - 1)
    distance = _log_uniform(saturation, config.saturation)[:, None, None]
    colour = _GREY + distance * (np.cos(hue_angle) * (np.eye(3) - _GREY) + np.sin(hue_angle) * _CROSS)
    contrast_factor = _log_uniform(contrast, config.contrast)
    return Parameters(
        theta=theta,
        points=2 * config.elastic * normal.reshape(-1, 2, ELASTIC_GRID, ELASTIC_GRID),
        contrast=contrast_factor,
        brightness=config.brightness * (2 * brightness - 1),
        gamma=_log_uniform(gamma, config.gamma),
        matrix=contrast_factor[:, None, None] * colour,
    )


def _upload(parameters: Parameters[np.ndarray], like: Tensor) -> Parameters[Tensor]:
    """Upload the parameters to the device and in the dtype of `like`, by one copy."""
    flat = np.concatenate([array.reshape(len(array), -1) for array in parameters], axis=1)
    columns = upload(flat, like.device, like.dtype).split([array[0].size for array in parameters], dim=1)
    return Parameters(*(column.reshape(array.shape) for array, column in zip(parameters, columns, strict=True)))


def _sampling_grid(parameters: Parameters[Tensor], config: AugmentConfig, size: Sequence[int]) -> Tensor:
    """Compute the source (x, y) of each pixel of the result, (H, W) = `size`: (B, H, W, 2) in [-1, 1]."""
    theta = parameters.theta
    grid = F.affine_grid(theta, [len(theta), 1, *size], align_corners=False)  # (B, H, W, 2)
    if not config.elastic:
        return grid
    shift = F.interpolate(parameters.points, size=tuple(size), mode="bicubic", align_corners=True)  # (B, 2, H, W)
    return grid + shift.permute(0, 2, 3, 1)


def _jitter_colours(images: Tensor, parameters: Parameters[Tensor]) -> Tensor:
    """Apply hue, saturation, contrast and brightness as one affine map of the three channels, then gamma."""
    mean = images.mean(dim=(1, 2, 3))  # (B,): contrast does not change it
    offset = mean * (1 - parameters.contrast) + parameters.brightness
    mixed = torch.baddbmm(offset.view(-1, 1, 1), parameters.matrix, images.flatten(2))  # (B, 3, H·W)
    return (mixed.clamp_(0, 1) ** parameters.gamma.view(-1, 1, 1)).view_as(images)


def _log_uniform(u: np.ndarray, bounds: Range) -> np.ndarray:
    """Map uniform numbers in [0, 1) to factors that are log-uniform between two bounds."""
    low, high = np.log(bounds)
    return np.exp(low + u * (high - low))
