"""The Improved UNet of Isensee et al. (arXiv:1802.10508, section 2.2) in 2D, as the authors' code builds it.

    level   channels        resolution   context pathway               localization pathway
    1       base            H × W        stem,    context[0] ── skip ─▶ up[3], localize[3] ─▶ head_full
    2       2 · base        H/2          down[0], context[1] ── skip ─▶ up[2], localize[2] ─▶ head_half,    reduce[2]
    3       4 · base        H/4          down[1], context[2] ── skip ─▶ up[1], localize[1] ─▶ head_quarter, reduce[1]
    4       8 · base        H/8          down[2], context[3] ── skip ─▶ up[0], localize[0] ─▶               reduce[0]
    5       16 · base       H/16         down[3], context[4] ─────────▶ up[0]

The encoder (context pathway) is made of pre-activation residual modules; the decoder (localization pathway)
concatenates each up-sampled map with the skip of its level. The three heads are added up to one map of logits (deep
supervision). Dropout in the context modules is keyed (`KeyedDropout`): no random generator is consumed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isicdist.network.dropout import KeyedDropout

LEVELS = 5
SIZE_DIVISOR = 2 ** (LEVELS - 1)
"""Height and width of the input must be multiples of it: the lowest level has 1/16 of the resolution."""


def _conv(in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2)


class ConvBeforeNorm(nn.Conv2d):
    """Convolution whose bias has no effect, as an instance norm subtracts it: it is not added.

    The authors' code has it, so that it is a parameter, but not a trained one: its gradient would be rounding, which
    Adam turns into steps.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, padding=kernel // 2)
        assert self.bias is not None
        self.bias.requires_grad_(False)  # or torch's DDP would wait for its gradient

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out_channels, h, w)."""
        return self._conv_forward(input, self.weight, None)


class NormAct(nn.Sequential):
    """Instance norm (per sample, affine, the same in training and evaluation), then LeakyReLU(0.01)."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.InstanceNorm2d(channels, affine=True), nn.LeakyReLU(0.01))

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), in the same memory layout."""
        if not _is_channels_last(input):
            return super().forward(input)
        # torch's instance norm would copy to the contiguous layout and back.
        norm, act = self
        assert isinstance(norm, nn.InstanceNorm2d)
        if input.device.type != "cpu":
            return act(elementary_instance_norm(input, norm.weight, norm.bias, norm.eps))
        # On a CPU channels-last is two to four times as fast for a bfloat16 convolution, and torch's batch norm of a
        # single sample is the same norm without copies.
        samples = [F.batch_norm(x, None, None, norm.weight, norm.bias, True, 0.0, norm.eps) for x in input.split(1)]
        return torch.cat([act(x) for x in samples])  # (B, C, H, W)


class ContextModule(nn.Module):
    """Pre-activation residual block `r + conv(A(N(dropout(conv(A(N(r)))))))`, N instance norm, A LeakyReLU.

    Level 1 has no norms inside, as in the authors' code.
    """

    def __init__(self, channels: int, dropout: float, level: int) -> None:
        super().__init__()
        first = level == 1
        self.norm1 = nn.LeakyReLU(0.01) if first else NormAct(channels)
        self.conv1 = _conv(channels, channels)
        self.dropout = KeyedDropout(dropout, layer=level)
        self.norm2 = nn.LeakyReLU(0.01) if first else NormAct(channels)
        self.conv2 = _conv(channels, channels) if first else ConvBeforeNorm(channels, channels)

    def forward(self, r: Tensor, keys: Tensor | None) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W). `keys` (B,) int64 of the dropout masks."""
        x = self.dropout(self.conv1(self.norm1(r)), keys)  # (B, C, H, W)
        return r + self.conv2(self.norm2(x))


class Upsample2(nn.Module):
    """Nearest-neighbour up-sampling to twice the height and width."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W)."""
        if not torch.compiler.is_dynamo_compiling():
            return F.interpolate(x, scale_factor=2, mode="nearest")
        # torch.compile would scatter the gradient by atomic additions, whose order is random on a GPU.
        if _is_channels_last(x):  # and stays so
            pixels = x.permute(0, 2, 3, 1)[:, :, None, :, None]  # (B, H, 1, W, 1, C)
            return pixels.expand(-1, -1, 2, -1, 2, -1).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
        return x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2).flatten(4).flatten(2, 3)


class UpSampling(nn.Sequential):
    """Nearest ×2, conv3x3 that halves the channels, norm, LeakyReLU: (B, C, H, W) -> (B, C/2, 2H, 2W).

    The one from the lowest level has a further conv1x1, norm, LeakyReLU.
    """

    def __init__(self, channels: int, *, lowest: bool) -> None:
        half = channels // 2
        layers: list[nn.Module] = [Upsample2(), ConvBeforeNorm(channels, half), NormAct(half)]
        if lowest:
            layers += [ConvBeforeNorm(half, half, 1), NormAct(half)]
        super().__init__(*layers)


class ImprovedUNet(nn.Module):
    """The Improved UNet: normalised images (B, in_channels, H, W) -> logits (B, out_channels, H, W).

    With the defaults it has the shape of the paper's: 3,205,715 parameters, 30 convolutions, 25 instance norms; the
    biases before a norm are parameters that are not trained.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 1,
        base_channels: int = 16,
        dropout: float = 0.3,
        deep_supervision: bool = True,
    ) -> None:
        """Build the network with He-normal initial weights, drawn from torch's global generator.

        `base_channels`: filters at full resolution, doubled at each of the four levels below. `dropout`: the share of
        elements dropped in each context module, in [0, 1). `deep_supervision`: add the heads at 1/4 and 1/2 of the
        resolution to the one at full resolution. Raises ValueError for a `dropout` out of range.
        """
        super().__init__()
        c = [base_channels * 2**level for level in range(LEVELS)]  # channels of each level
        self.deep_supervision = deep_supervision

        self.stem = _conv(in_channels, c[0])
        self.context = nn.ModuleList(ContextModule(c[i], dropout, level=i + 1) for i in range(LEVELS))
        self.context_norms = nn.ModuleList(NormAct(c[i]) for i in range(LEVELS))
        self.down = nn.ModuleList(ConvBeforeNorm(c[i], c[i + 1], stride=2) for i in range(LEVELS - 1))
        self.skip_act = nn.LeakyReLU(0.01)  # of level 1, whose skip is not normalised

        decoder_levels = range(LEVELS - 2, -1, -1)
        self.up = nn.ModuleList(UpSampling(c[i + 1], lowest=i == LEVELS - 2) for i in decoder_levels)
        self.localize = nn.ModuleList(
            nn.Sequential(ConvBeforeNorm(2 * c[i], 2 * c[i]), NormAct(2 * c[i])) for i in decoder_levels
        )
        self.reduce = nn.ModuleList(
            nn.Sequential(ConvBeforeNorm(2 * c[i], c[i], 1), NormAct(c[i])) for i in decoder_levels if i
        )

        self.head_full = nn.Conv2d(2 * c[0], out_channels, 1)
        if deep_supervision:
            self.head_half = nn.Conv2d(2 * c[1], out_channels, 1)
            self.head_quarter = nn.Conv2d(2 * c[2], out_channels, 1)
            self.upsample = Upsample2()
        self.apply(_he_normal)

    def forward(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Compute the logits (B, out_channels, H, W) of normalised float images (B, in_channels, H, W).

        `keys` (B,) int64 seed the dropout mask of each sample; required in training when dropout is above 0.
        Raises ValueError for a height or width that is not a multiple of 16, or for missing keys.
        """
        height, width = images.shape[-2:]
        if height % SIZE_DIVISOR or width % SIZE_DIVISOR:
            raise ValueError(f"images of {height}x{width}: height and width must be multiples of {SIZE_DIVISOR}")

        if images.device.type == "cpu" and not torch.compiler.is_compiling():
            # bfloat16 runs in channels-last (see NormAct). Float32 gains little there, and the batch norm that stands
            # in for the instance norm would be off by 1e-3 at 512 × 512.
            bf16 = torch.is_autocast_enabled("cpu")
            images = images.contiguous(memory_format=torch.channels_last if bf16 else torch.contiguous_format)
        elif images.device.type != "cpu":
            images = images.contiguous()  # as augmentation gives it in training: torch's norm takes no other layout

        # Context pathway. `level` counts from 0, the full resolution: C = base_channels · 2^level, h = H / 2^level.
        x: Tensor = self.stem(images)  # (B, base_channels, H, W)
        skips: list[Tensor] = []
        for level in range(LEVELS):
            r: Tensor = x if level == 0 else self.down[level - 1](x)  # (B, C, h, w)
            s: Tensor = self.context[level](r, keys)  # (B, C, h, w)
            x = self.context_norms[level](s)  # (B, C, h, w)
            skips.append(self.skip_act(s) if level == 0 else x)

        # Localization pathway.
        localized: list[Tensor] = []  # from the lowest level, 3, to the full resolution
        for i, level in enumerate(range(LEVELS - 2, -1, -1)):
            both = torch.cat([skips[level], self.up[i](x)], dim=1)  # (B, 2C, h, w)
            localized.append(self.localize[i](both))  # (B, 2C, h, w)
            x = self.reduce[i](localized[i]) if level else localized[i]  # (B, C, h, w)

        # Deep supervision.
        logits = self.head_full(localized[3])  # (B, out_channels, H, W)
        if self.deep_supervision:
            half = self.head_half(localized[2]) + self.upsample(self.head_quarter(localized[1]))  # (B, out, H/2, W/2)
            logits = logits + self.upsample(half)
        return logits


def elementary_instance_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Instance norm of (B, C, H, W) by elementary operators: they keep the memory layout, and torch.compile fuses them.

    `weight` and `bias` (C,). Statistics are computed in float32 at least; the result has the type of `x`.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    variance, mean = torch.var_mean(wide, dim=(2, 3), correction=0, keepdim=True)  # (B, C, 1, 1)
    scale = weight[:, None, None] * torch.rsqrt(variance + eps)  # (B, C, 1, 1)
    return ((wide - mean) * scale + bias[:, None, None]).to(x.dtype)


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _he_normal(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, a=0.01, nonlinearity="leaky_relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
