"""Loss: soft Dice per image plus binary cross-entropy (BCE)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Cast to float32 at least (float64 stays): sums over a 512 × 512 image overflow float16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def segmentation_loss(logits: Tensor, masks: Tensor, bce_weight: float = 0.5) -> Tensor:
    """Compute the loss of each sample, 1 - soft Dice + `bce_weight` × BCE: (B,), at least float32.

    `logits` (B, 1, H, W), any float; `masks` (B, 1, H, W), 1 where the lesion is, else 0. Soft Dice is that of Isensee
    et al. (arXiv:1802.10508, section 2.3) per image and foreground class, 2 Σpt / (Σp + Σt), with 1 added to numerator
    and denominator: an empty prediction of an empty mask scores 1, and the gradient stays finite. BCE is the mean over
    the pixels.
    """
    logits = at_least_float32(logits).flatten(1)  # (B, H·W)
    targets = masks.flatten(1).to(logits.dtype)  # (B, H·W)
    probs = logits.sigmoid()  # (B, H·W)
    overlap = (probs * targets).sum(1)  # (B,)
    dice = (2 * overlap + 1) / (probs.sum(1) + targets.sum(1) + 1)
    bce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
    return 1 - dice + bce_weight * bce
