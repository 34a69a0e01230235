"""Augmentation of a whole batch on its device, and the normalisation that every image goes through.

What happens to a sample is a pure function of its key (see `isicdist.data.order.random_keys`): its random numbers are
drawn on the host, a few per sample, and the pixels are moved on the device: one resampling, one matrix product for
the colours. Mirror, rotation, scale, elastic deformation, contrast, gamma and brightness are those of Isensee et al.
(arXiv:1802.10508, section 2.4); hue and saturation are ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from isicdist.config import AugmentConfig, Range
from isicdist.data.order import uniforms
from isicdist.data.upload import upload

ELASTIC_GRID = 4
"""Control points of the elastic deformation along a side."""
_SCALARS = 8
_GREY = np.full((3, 3), 1 / 3)
_TURN = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
_DRAWS = _SCALARS + 2 * 2 * ELASTIC_GRID**2


def augment(
    images: Tensor, masks: Tensor, keys: np.ndarray, config: AugmentConfig, side: int | None = None
) -> tuple[Tensor, Tensor]:
    """Augment a batch: float images (B, 3, H, W) in [0, 1] and uint8 masks (B, 1, H, W) of 0 and 1.

    `keys` (B,) int64 on the host; `side` of the result in pixels, where it is not that of the images. The mask is
    resampled by the nearest pixel, so it stays 0 and 1. Beyond the border lies the reflection, in image and mask alike.
    """
    parameters = _upload_all(_draw_parameters(keys, config), images)
    grid = _sampling_grid(parameters, config, (side, side) if side else images.shape[2:])  # (B, H, W, 2)
    images = F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    floats = masks.to(images.dtype)
    moved = F.grid_sample(floats, grid, mode="nearest", padding_mode="reflection", align_corners=False)
    return _jitter_colours(images, parameters), moved.to(masks.dtype)


def _draw_parameters(keys: np.ndarray, config: AugmentConfig) -> dict[str, np.ndarray]:
    """Draw the parameters of each sample on the host, float64: a pure function of its key."""
    draws = uniforms(keys, _DRAWS)  # (B, draws)
    mirrored, quarter_turns = np.divmod(np.floor(8 * draws[:, 2]), 4)  # one of the 8 symmetries of the square
    angle = np.pi / 2 * quarter_turns + np.deg2rad(config.rotation) * (2 * draws[:, 0] - 1)
    zoom = _log_uniform(draws[:, 1], config.scale)
    mirror = 1 - 2 * mirrored
    sin, cos = np.sin(angle) / zoom, np.cos(angle) / zoom
    theta = np.zeros((len(draws), 2, 3))
    theta[:, 0, 0], theta[:, 0, 1] = mirror * cos, -mirror * sin
    theta[:, 1, 0], theta[:, 1, 1] = sin, cos
    # Box and Muller: two uniforms make one normal displacement of a control point.
    u, v = draws[:, _SCALARS:].reshape(len(draws), 2, -1).transpose(1, 0, 2)
    normal = np.sqrt(-2 * np.log1p(-u)) * np.cos(2 * np.pi * v)
    contrast = _log_uniform(draws[:, 3], config.contrast)
    hue = np.deg2rad(config.hue) * (2 * draws[:, 6, None, None] - 1)
    saturation = _log_uniform(draws[:, 7], config.saturation)[:, None, None]
    # The hue turns colours about the grey axis, the saturation moves them to or from it, and grey stays (Rodrigues).
    colour = _GREY + saturation * (np.cos(hue) * (np.eye(3) - _GREY) + np.sin(hue) * _TURN)
    return {
        "theta": theta,  # (B, 2, 3)
        "points": 2 * config.elastic * normal.reshape(-1, 2, ELASTIC_GRID, ELASTIC_GRID),
        "contrast": contrast,  # (B,)
        "brightness": config.brightness * (2 * draws[:, 4] - 1),
        "gamma": _log_uniform(draws[:, 5], config.gamma),
        "matrix": contrast[:, None, None] * colour,  # (B, 3, 3)
    }


def _upload_all(arrays: dict[str, np.ndarray], like: Tensor) -> dict[str, Tensor]:
    """Bring arrays (B, ...) to the device and the dtype of `like` in one copy."""
    flat = np.concatenate([array.reshape(len(array), -1) for array in arrays.values()], axis=1)
    columns = upload(flat, like.device, like.dtype).split([array[0].size for array in arrays.values()], dim=1)
    return {name: column.reshape(array.shape) for (name, array), column in zip(arrays.items(), columns, strict=True)}


def _sampling_grid(parameters: dict[str, Tensor], config: AugmentConfig, size: Sequence[int]) -> Tensor:
    """Give the source of each pixel of the result, (H, W) = `size`: (B, H, W, 2) in [-1, 1], x first."""
    theta = parameters["theta"]
    grid = F.affine_grid(theta, [len(theta), 1, *size], align_corners=False)
    if not config.elastic:
        return grid
    shift = F.interpolate(parameters["points"], size=tuple(size), mode="bicubic", align_corners=True)
    return grid + shift.permute(0, 2, 3, 1)


def _jitter_colours(images: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """Apply hue, saturation, contrast and brightness as one affine map of the three channels, then gamma."""
    mean = images.mean(dim=(1, 2, 3))  # (B,): contrast does not change it
    offset = mean * (1 - parameters["contrast"]) + parameters["brightness"]
    mixed = torch.baddbmm(offset.view(-1, 1, 1), parameters["matrix"], images.flatten(2))  # (B, 3, H·W)
    return (mixed.clamp_(0, 1) ** parameters["gamma"].view(-1, 1, 1)).view_as(images)


def _log_uniform(u: np.ndarray, bounds: Range) -> np.ndarray:
    """Map uniform numbers to factors between two bounds, as likely to be halved as doubled."""
    low, high = np.log(bounds)
    return np.exp(low + u * (high - low))
