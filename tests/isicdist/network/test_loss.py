"""The loss: by hand, on empty masks, and in half precision."""

from __future__ import annotations

import math

import pytest
import torch

from isicdist.network.loss import segmentation_loss


def test_by_hand():
    logits = torch.tensor([0.0, math.log(3), -math.log(3), math.log(4)]).view(1, 1, 2, 2)
    masks = torch.tensor([1, 1, 0, 0], dtype=torch.uint8).view(1, 1, 2, 2)
    probs = (1 / 2, 3 / 4, 1 / 4, 4 / 5)
    dice = (2 * (probs[0] + probs[1]) + 1) / (sum(probs) + 2 + 1)
    bce = -(math.log(probs[0]) + math.log(probs[1]) + math.log(1 - probs[2]) + math.log(1 - probs[3])) / 4
    assert float(segmentation_loss(logits, masks, bce_weight=0.0)) == pytest.approx(1 - dice, abs=1e-6)
    assert float(segmentation_loss(logits, masks, bce_weight=0.5)) == pytest.approx(1 - dice + bce / 2, abs=1e-6)


def test_each_sample_has_its_own():
    logits = torch.randn((4, 1, 8, 8), generator=torch.Generator().manual_seed(1))
    masks = (torch.rand((4, 1, 8, 8), generator=torch.Generator().manual_seed(2)) > 0.5).to(torch.uint8)
    together = segmentation_loss(logits, masks)
    assert together.shape == (4,)
    alone = [segmentation_loss(logits[i : i + 1], masks[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone))
    assert len(set(together.tolist())) == 4


def test_an_empty_mask_with_an_empty_prediction_costs_nothing():
    empty = torch.zeros((2, 1, 64, 64), dtype=torch.uint8)
    assert segmentation_loss(torch.full((2, 1, 64, 64), -30.0), empty).max() < 1e-6
    assert segmentation_loss(torch.full((2, 1, 64, 64), 30.0), empty).min() > 0.99


def test_float16_holds_512_pixels_of_foreground():
    """The sum of the mask, 262,144, is beyond float16."""
    logits = torch.full((1, 1, 512, 512), 2.0, dtype=torch.float16)
    loss = segmentation_loss(logits, torch.ones((1, 1, 512, 512), dtype=torch.uint8))
    p, n = 1 / (1 + math.exp(-2)), 512 * 512
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(1 - (2 * p * n + 1) / (p * n + n + 1) - 0.5 * math.log(p), abs=1e-5)


@pytest.mark.parametrize(
    ("given", "returned"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_at_least_float32(given, returned):
    masks = torch.ones((1, 1, 4, 4), dtype=torch.uint8)
    assert segmentation_loss(torch.zeros((1, 1, 4, 4), dtype=given), masks).dtype == returned


@pytest.mark.parametrize("logit", [-60_000.0, 0.0, 60_000.0])
@pytest.mark.parametrize("target", [0, 1])
def test_the_gradient_is_finite(logit, target):
    logits = torch.full((1, 1, 16, 16), logit, dtype=torch.float16, requires_grad=True)
    segmentation_loss(logits, torch.full((1, 1, 16, 16), target, dtype=torch.uint8)).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    if logit == 0:
        assert (logits.grad < 0).all() if target else (logits.grad > 0).all()
