"""Dropout without a generator: which elements are dropped is a hash of (key of the sample, layer, element).

So a sample sees the same mask on any rank, in any micro batch, at any time, and there is no random state to save.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn


class KeyedDropout(nn.Module):
    """Element-wise dropout whose mask is a pure function of (key, layer, element); the identity in evaluation."""

    def __init__(self, p: float, layer: int) -> None:
        """`p`: the share of elements that is dropped, in [0, 1). `layer`: tells the layers of a network apart."""
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout {p}: it must be in [0, 1)")
        self.p = p
        self.layer = layer

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """`x` (B, C, H, W), `keys` (B,) int64 -> (B, C, H, W)."""
        if not self.training or self.p == 0:
            return x
        if keys is None:
            raise ValueError("in training with dropout the network needs keys (B,) int64: model(images, keys)")
        keep = keyed_keep(keys, self.layer, x[0], self.p)  # (B, C, H, W)
        return x * keep.to(x.dtype).mul_(1 / (1 - self.p))

    def extra_repr(self) -> str:
        """Show the rate and the layer in `repr`."""
        return f"p={self.p}, layer={self.layer}"


def keyed_keep(keys: Tensor, layer: int, sample: Tensor, p: float) -> Tensor:
    """Which elements stay, bool (B, *sample.shape), each with probability 1 - p, in the memory layout of `sample`.

    int32 on the device throughout (it wraps, as the hash wants): `keys` (B,) int64 are folded with the layer,
    XORed with a hash of the element that is computed once per shape, and mixed once more.
    """
    key = _fold(keys, layer).view(-1, *[1] * sample.ndim)
    h = (_element_hash(sample.shape, sample.stride(), keys.device) ^ key).mul_(_ODD_1)
    h ^= h >> 15
    h.mul_(_ODD_2)
    threshold = round((p - 0.5) * 2**32)  # of a value spread evenly over int32
    return h >= threshold


_ODD_1 = 0x2C1B3C6D
_ODD_2 = 0x297A2D39


@functools.lru_cache(maxsize=64)
def _element_hash(shape: torch.Size, stride: tuple[int, ...], device: torch.device) -> Tensor:
    """A hash of each element's number in row-major order, int32 (1, *shape), lying in memory as `stride` says."""
    with torch.inference_mode(False):  # a cached tensor outlives the mode it is made in
        numbers = torch.arange(1, shape.numel() + 1, dtype=torch.int64, device=device).view(shape)
        return torch.empty_strided(shape, stride, dtype=torch.int32, device=device).copy_(_int32(_mix64(numbers)))[None]


def _fold(keys: Tensor, layer: int) -> Tensor:
    return _int32(_mix64(keys ^ (layer * 0x5851F42D4C957F2D & 0x7FFFFFFFFFFFFFFF)))


def _mix64(x: Tensor) -> Tensor:
    """SplitMix64's finalizer with signed shifts: still a bijection of the 64 bits."""
    x = (x ^ (x >> 30)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31)


def _int32(x: Tensor) -> Tensor:
    """The upper 32 bits, where a multiplication mixes best."""
    return (x >> 32).to(torch.int32)
