"""Soft Dice per image, with binary cross-entropy beside it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32 at least: sums over a 512 x 512 image overflow float16. float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def segmentation_loss(logits: Tensor, masks: Tensor, bce_weight: float = 0.5) -> Tensor:
    """The loss of each sample: 1 - soft Dice + `bce_weight` x BCE; (B,), at least float32.

    `logits` (B, 1, H, W), any float; `masks` (B, 1, H, W), 1 where the lesion is. Soft Dice is that of Isensee et
    al. (arXiv:1802.10508, section 2.3) per image and foreground class, 2 sum(pt) / (sum(p) + sum(t)); the 1 in both
    parts makes an empty mask with an empty prediction score 1 and keeps the gradient finite.
    """
    logits = at_least_float32(logits).flatten(1)  # (B, H·W)
    targets = masks.flatten(1).to(logits.dtype)  # (B, H·W)
    probs = logits.sigmoid()
    overlap = (probs * targets).sum(1)
    dice = (2 * overlap + 1) / (probs.sum(1) + targets.sum(1) + 1)
    bce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
    return 1 - dice + bce_weight * bce
