"""The Improved UNet of Isensee et al. (arXiv:1802.10508, section 2.2) in 2D, as the authors' code builds it.

A context pathway of residual modules goes down five levels, a localization pathway comes up again, and heads at
quarter, half and full resolution are summed into one map of logits (deep supervision). The names of the paper are
kept. Dropout is keyed: which elements are dropped is a hash of (key of the sample, layer, element), so a sample
sees the same mask on any rank, in any micro batch, at any time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isicdist.network.dropout import KeyedDropout

LEVELS = 5
SIZE_DIVISOR = 2 ** (LEVELS - 1)
"""Height and width must be multiples of it: the lowest level is 16 times smaller."""


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
        self.norm1 = nn.LeakyReLU(0.01) if first else NormAct(channels)
        self.conv1 = _conv(channels, channels)
        self.dropout = KeyedDropout(dropout, layer=level)
        self.norm2 = nn.LeakyReLU(0.01) if first else NormAct(channels)
        self.conv2 = _conv(channels, channels)

    def forward(self, r: Tensor, keys: Tensor | None) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = self.dropout(self.conv1(self.norm1(r)), keys)
        return r + self.conv2(self.norm2(x))


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
        self.context_norms = nn.ModuleList(NormAct(c[i]) for i in range(LEVELS))
        self.down = nn.ModuleList(_conv(c[i], c[i + 1], stride=2) for i in range(LEVELS - 1))
        self.skip_act = nn.LeakyReLU(0.01)  # the skip of level 1 is not normalised

        decoder_levels = range(LEVELS - 2, -1, -1)
        self.up = nn.ModuleList(UpSampling(c[i + 1], lowest=i == LEVELS - 2) for i in decoder_levels)
        self.localize = nn.ModuleList(
            nn.Sequential(_conv(2 * c[i], 2 * c[i]), NormAct(2 * c[i])) for i in decoder_levels
        )
        self.reduce = nn.ModuleList(nn.Sequential(_conv(2 * c[i], c[i], 1), NormAct(c[i])) for i in decoder_levels if i)

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
        if height % SIZE_DIVISOR or width % SIZE_DIVISOR:
            raise ValueError(f"images of {height}x{width}: height and width must be multiples of {SIZE_DIVISOR}")

        if images.device.type == "cpu" and not torch.compiler.is_compiling():
            # In channels-last see NormAct. In float32 its sums would be off by 1e-3 at 512 x 512, for little speed.
            narrow = torch.is_autocast_enabled("cpu")
            images = images.contiguous(memory_format=torch.channels_last if narrow else torch.contiguous_format)
        x, skips = self.stem(images), []
        for level in range(LEVELS):
            r = x if level == 0 else self.down[level - 1](x)
            s = self.context[level](r, keys)
            x = self.context_norms[level](s)  # (B, 16·2^level, H/2^level, W/2^level)
            skips.append(self.skip_act(s) if level == 0 else x)

        heads = []
        for i, level in enumerate(range(LEVELS - 2, -1, -1)):
            merged = self.localize[i](torch.cat([skips[level], self.up[i](x)], dim=1))  # (B, 2C, H/2^level, ...)
            heads.append(merged)
            x = self.reduce[i](merged) if level else merged

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
