"""The Improved UNet of Isensee et al. (arXiv:1802.10508, section 2.2) in 2D, as the authors' code builds it.

A context pathway of residual modules goes down five levels, a localization pathway comes up again, and heads at
quarter, half and full resolution are summed into one map of logits (deep supervision). The names of the paper are
kept. Dropout is keyed: which elements are dropped is a hash of (key of the sample, layer, element), so a sample
sees the same mask on any rank, in any micro batch, at any time.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 5
STRIDE = 2 ** (LEVELS - 1)
"""Height and width must be multiples of it: the lowest level is 16 times smaller."""


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


def _conv(in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2)


class NormAct(nn.Sequential):
    """Instance norm (per sample, affine, the same in training and evaluation), then LeakyReLU(0.01)."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.InstanceNorm2d(channels, affine=True), nn.LeakyReLU(0.01))

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), in the same memory layout."""
        if input.device.type != "cpu" or not _is_channels_last(input):
            return super().forward(input)
        # A CPU convolves bfloat16 two to four times as fast in this layout. torch's instance norm would copy out of
        # it and back; its batch norm of one sample is the same norm and stays in it.
        norm, act = self
        assert isinstance(norm, nn.InstanceNorm2d)
        samples = [F.batch_norm(x, None, None, norm.weight, norm.bias, True, 0.0, norm.eps) for x in input.split(1)]
        return torch.cat([act(x) for x in samples])


class ContextModule(nn.Module):
    """`s = r + conv(A(N(dropout(conv(A(N(r)))))))`; without norms inside at level 1, as in the authors' code."""

    def __init__(self, channels: int, dropout: float, level: int) -> None:
        super().__init__()
        first = level == 1
        self.before = nn.LeakyReLU(0.01) if first else NormAct(channels)
        self.conv1 = _conv(channels, channels)
        self.dropout = KeyedDropout(dropout, layer=level)
        self.between = nn.LeakyReLU(0.01) if first else NormAct(channels)
        self.conv2 = _conv(channels, channels)

    def forward(self, r: Tensor, keys: Tensor | None) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = self.dropout(self.conv1(self.before(r)), keys)
        return r + self.conv2(self.between(x))


class UpSampling(nn.Sequential):
    """Nearest x2, conv3x3 that halves the channels, N, A; the lowest has a further 1x1, N, A."""

    def __init__(self, channels: int, *, lowest: bool) -> None:
        half = channels // 2
        layers = [nn.Upsample(scale_factor=2, mode="nearest"), _conv(channels, half), NormAct(half)]
        if lowest:
            layers += [_conv(half, half, 1), NormAct(half)]
        super().__init__(*layers)


class ImprovedUNet(nn.Module):
    """The network: images in, logits out.

    `base_channels`: filters at full resolution, doubled at each of the four levels below. With the defaults it has
    the paper's shape: 3,205,715 parameters, 30 convolutions, 25 instance norms.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 1,
        base_channels: int = 16,
        dropout: float = 0.3,
        deep_supervision: bool = True,
    ) -> None:
        """`dropout`: the share of elements dropped in each context module, in [0, 1).

        `deep_supervision`: whether the quarter and half resolution heads are added to the full one.
        """
        super().__init__()
        c = [base_channels * 2**level for level in range(LEVELS)]
        self.deep_supervision = deep_supervision

        self.stem = _conv(in_channels, c[0])
        self.context = nn.ModuleList(ContextModule(c[i], dropout, level=i + 1) for i in range(LEVELS))
        self.hand_on = nn.ModuleList(NormAct(c[i]) for i in range(LEVELS))
        self.down = nn.ModuleList(_conv(c[i], c[i + 1], stride=2) for i in range(LEVELS - 1))
        self.skip_act = nn.LeakyReLU(0.01)  # the skip of level 1 is not normalised

        rising = range(LEVELS - 2, -1, -1)
        self.up = nn.ModuleList(UpSampling(c[i + 1], lowest=i == LEVELS - 2) for i in rising)
        self.merge = nn.ModuleList(nn.Sequential(_conv(2 * c[i], 2 * c[i]), NormAct(2 * c[i])) for i in rising)
        self.halve = nn.ModuleList(nn.Sequential(_conv(2 * c[i], c[i], 1), NormAct(c[i])) for i in rising if i)

        self.head_full = nn.Conv2d(2 * c[0], out_channels, 1)
        if deep_supervision:
            self.head_half = nn.Conv2d(2 * c[1], out_channels, 1)
            self.head_quarter = nn.Conv2d(2 * c[2], out_channels, 1)
        self.apply(_he_normal)

    def forward(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Logits (B, out_channels, H, W) of images (B, in_channels, H, W), floats.

        `keys` (B,) int64: which dropout masks are drawn; needed in training when dropout is above 0.
        Raises ValueError for a height or width that is not a multiple of 16.
        """
        height, width = images.shape[-2:]
        if height % STRIDE or width % STRIDE:
            raise ValueError(f"images of {height}x{width}: height and width must be multiples of {STRIDE}")

        if images.device.type == "cpu" and not torch.compiler.is_compiling():
            # In channels-last see NormAct. In float32 its sums would be off by 1e-3 at 512 x 512, for little speed.
            narrow = torch.is_autocast_enabled("cpu")
            images = images.contiguous(memory_format=torch.channels_last if narrow else torch.contiguous_format)
        x, skips = self.stem(images), []
        for level in range(LEVELS):
            r = x if level == 0 else self.down[level - 1](x)
            s = self.context[level](r, keys)
            x = self.hand_on[level](s)  # (B, 16·2^level, H/2^level, W/2^level)
            skips.append(self.skip_act(s) if level == 0 else x)

        heads = []
        for i, level in enumerate(range(LEVELS - 2, -1, -1)):
            merged = self.merge[i](torch.cat([skips[level], self.up[i](x)], dim=1))  # (B, 2C, H/2^level, ...)
            heads.append(merged)
            x = self.halve[i](merged) if level else merged

        logits = self.head_full(heads[3])
        if self.deep_supervision:
            logits = logits + _up2(self.head_half(heads[2]) + _up2(self.head_quarter(heads[1])))
        return logits  # (B, out_channels, H, W)


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _up2(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


def _he_normal(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, a=0.01, nonlinearity="leaky_relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
