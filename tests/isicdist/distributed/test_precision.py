"""Loss, Dice and norms keep their statistics in half precision, where sums over an image overflow."""

from __future__ import annotations

import pytest
import torch

from isicdist.metrics.dice import DiceSummary, count
from isicdist.network.loss import segmentation_loss
from isicdist.network.unet import ImprovedUNet, NormAct

HALVES = [torch.float16, torch.bfloat16]
SIDE = 512  # 262,144 pixels; float16 ends at 65,504


@pytest.mark.parametrize("dtype", HALVES)
def test_the_loss_of_a_wholly_foreground_mask_is_that_of_float32(dtype):
    masks = torch.ones((2, 1, SIDE, SIDE), dtype=torch.uint8)
    logits = torch.full((2, 1, SIDE, SIDE), 3.0, dtype=dtype, requires_grad=True)
    loss = segmentation_loss(logits, masks)
    torch.testing.assert_close(loss, segmentation_loss(torch.full_like(logits, 3.0, dtype=torch.float32), masks))
    assert loss.dtype == torch.float32
    (65536 * loss.sum()).backward()  # as the gradient scaler begins
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (logits.grad < 0).all()  # nothing has become zero


@pytest.mark.parametrize("dtype", HALVES)
def test_the_dice_of_a_wholly_foreground_mask_counts_every_pixel(dtype):
    logits = torch.full((1, 1, SIDE, SIDE), 3.0, dtype=dtype)
    logits[..., 0] = -3.0
    counts = count(logits > 0, torch.ones_like(logits) > 0)
    assert counts.tolist() == [[SIDE * (SIDE - 1), 0, SIDE]]
    rows = torch.cat([torch.zeros((1, 1), dtype=torch.int64), counts], dim=1).numpy()
    assert DiceSummary.of(rows).mean_dice == 2 * (SIDE - 1) / (2 * SIDE - 1)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_statistics_of_a_norm_are_those_of_float32(dtype):
    """The mean is far from zero: summed in half precision, it would overflow or lose all its digits."""
    norm = NormAct(2)
    generator = torch.Generator().manual_seed(0)
    x = (30 + 4 * torch.randn((1, 2, SIDE, SIDE), generator=generator)).to(dtype)
    expected = norm(x.float())
    with torch.autocast("cpu", dtype):
        normalised = norm(x)
    torch.testing.assert_close(normalised.float(), expected, rtol=2**-7, atol=2**-7)  # bf16 has 8 bits


@pytest.mark.parametrize("dtype", HALVES)
def test_the_network_is_finite_in_half_precision_on_a_large_image(dtype):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ImprovedUNet(base_channels=2, dropout=0.0)
    images = 4 + torch.randn((1, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype):
        logits = model(images)
    segmentation_loss(logits, torch.ones_like(logits)).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == 90  # all but the biases before a norm
    assert all(gradient.isfinite().all() for gradient in gradients)
