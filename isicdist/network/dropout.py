"""Stateless dropout: the mask is a counter-based hash of (key of the sample, layer, element), no generator is consumed.

A sample gets the same mask on any rank and in any micro batch, and a checkpoint has no random state to save.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

# Odd multipliers: multiplication by them is a bijection of the 32 bits.
_ODD_1 = 0x2C1B3C6D
_ODD_2 = 0x297A2D39


class KeyedDropout(nn.Module):
    """Element-wise dropout whose mask is a pure function of (key, layer, element); the identity in evaluation."""

    def __init__(self, p: float, layer: int) -> None:
        """`p`: probability of an element to be dropped, in [0, 1). `layer`: number of this layer in its network.

        Raises ValueError for a `p` out of range.
        """
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout {p}: it must be in [0, 1)")
        self.p = p
        self.layer = layer

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """Drop elements of `x` (B, C, H, W) by the `keys` (B,) int64 of its samples, and scale the others by 1/(1 - p).

        In evaluation `x` is returned as it is. Raises ValueError in training without keys.
        """
        if not self.training or self.p == 0:
            return x
        if keys is None:
            raise ValueError("in training with dropout the network needs keys (B,) int64: model(images, keys)")
        return x * self._draw_keep(x, keys).to(x.dtype).mul_(1 / (1 - self.p))

    def _draw_keep(self, x: Tensor, keys: Tensor) -> Tensor:
        """Draw the keep mask (B, C, H, W) in the form that the device is fastest with: bool, or int32 of 0 and 1."""
        if x.device.type != "cpu":
            return keyed_keep(keys, self.layer, x[0], self.p)
        if torch.compiler.is_compiling():
            # On a CPU inductor (of torch 2.13) fuses mask and instance norm after a convolution into wrong numbers.
            return _opaque_keyed_keep(keys, self.layer, x[0], self.p)
        # A CPU compares int32 in place, and converts it, in a quarter of the time of bool, which is not vectorised.
        return _keyed_hash(keys, self.layer, x[0]).ge_(_quantile(self.p))

    def extra_repr(self) -> str:
        """Show the rate and the layer in `repr`."""
        return f"p={self.p}, layer={self.layer}"


def keyed_keep(keys: Tensor, layer: int, sample: Tensor, p: float) -> Tensor:
    """Draw the keep mask, bool (B, *sample.shape), True with probability 1 - p, in the memory layout of `sample`.

    `keys` (B,) int64; nothing is copied between the host and the device.
    """
    return _keyed_hash(keys, layer, sample) >= _quantile(p)


def _quantile(p: float) -> int:
    """Compute the p-quantile of a uniform int32."""
    return round((p - 0.5) * 2**32)


def _keyed_hash(keys: Tensor, layer: int, sample: Tensor) -> Tensor:
    """Hash (key, layer, element) to uniform int32 (B, *sample.shape), in the memory layout of `sample`.

    The overflow of int32 wraps: the keys are hashed with the layer, XORed with a hash of the element that is cached per
    shape, and mixed once more, in place.
    """
    key = _key_hash(keys, layer).view(-1, *[1] * sample.ndim)  # (B, 1, ...)
    if torch.compiler.is_compiling():
        elements = _element_hash(sample.shape, keys.device)  # one kernel with what follows: nothing to cache
    else:
        elements = _cached_element_hash(sample.shape, sample.stride(), keys.device)
    h = (elements ^ key).mul_(_ODD_1)  # (B, *sample.shape) int32
    h ^= h >> 15
    return h.mul_(_ODD_2)


def _element_hash(shape: torch.Size, device: torch.device) -> Tensor:
    """Hash each element's index in row-major order, int32 (1, *shape)."""
    indices = torch.arange(1, shape.numel() + 1, dtype=torch.int64, device=device).view(shape)
    return _upper_half(_mix64_signed(indices))[None]


@functools.lru_cache(maxsize=64)
def _cached_element_hash(shape: torch.Size, stride: tuple[int, ...], device: torch.device) -> Tensor:
    """Hash as `_element_hash`, with the memory layout of `stride`."""
    with torch.inference_mode(False):  # a cached tensor outlives the mode it is made in
        hashes = torch.empty_strided(shape, stride, dtype=torch.int32, device=device)
        return hashes.copy_(_element_hash(shape, device)[0])[None]


@torch.library.custom_op("isicdist::keyed_keep", mutates_args=())
def _opaque_keyed_keep(keys: Tensor, layer: int, sample: Tensor, p: float) -> Tensor:
    """Draw as `keyed_keep`, as one operator that inductor does not look into; contiguous in any memory layout."""
    return keyed_keep(keys, layer, sample, p).contiguous()


@_opaque_keyed_keep.register_fake
def _(keys: Tensor, layer: int, sample: Tensor, p: float) -> Tensor:
    return sample.new_empty((len(keys), *sample.shape), dtype=torch.bool)


def _key_hash(keys: Tensor, layer: int) -> Tensor:
    """Hash (key, layer) to int32 (B,)."""
    return _upper_half(_mix64_signed(keys ^ (layer * 0x5851F42D4C957F2D & 0x7FFFFFFFFFFFFFFF)))


def _mix64_signed(x: Tensor) -> Tensor:
    """Mix int64 by SplitMix64's finalizer with arithmetic (signed) right shifts, as torch has no others.

    A bijection too, but its values are not those of `isicdist.data.order._mix64`, whose shifts are logical.
    """
    x = (x ^ (x >> 30)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31)


def _upper_half(x: Tensor) -> Tensor:
    """Take the upper 32 bits of int64 as int32: multiplication mixes them best."""
    return (x >> 32).to(torch.int32)
