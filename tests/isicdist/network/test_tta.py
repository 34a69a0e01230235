"""Test-time augmentation against numpy, and the symmetry that it gives a network."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from isicdist.config import Tta
from isicdist.network.tta import SYMMETRIES, mean_probs
from isicdist.network.unet import ImprovedUNet

IMAGES = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32))


def network() -> ImprovedUNet:
    torch.manual_seed(0)
    return ImprovedUNet(base_channels=2).eval()


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def test_off_is_the_network_alone():
    with torch.inference_mode():
        assert torch.equal(mean_probs(network(), IMAGES, "off"), network()(IMAGES).sigmoid())


def test_each_prediction_is_transformed_back_before_the_mean():
    weight = torch.arange(32 * 32, dtype=torch.float32).reshape(32, 32) / 500 - 1  # says another thing of every pixel
    probs = mean_probs(lambda images: images[:, :1] * weight, IMAGES, "d4").numpy()
    image, total = IMAGES.numpy()[:, 0], np.zeros((2, 32, 32))
    for turns in range(4):
        for axes in ((), (1,)):  # rows mirrored or not: with the turns, all eight symmetries
            seen = np.flip(np.rot90(image, turns, axes=(1, 2)), axes)
            total += np.rot90(np.flip(sigmoid(seen * weight.numpy()), axes), -turns, axes=(1, 2))
    np.testing.assert_allclose(probs[:, 0], total / 8, atol=1e-6)


def test_flips_are_the_image_and_its_mirror_images():
    seen: list[np.ndarray] = []

    def watched(images: torch.Tensor) -> torch.Tensor:
        seen.append(images.numpy())
        return images[:, :1]

    mean_probs(watched, IMAGES, "flips")
    expected = [np.flip(IMAGES.numpy(), axes) for axes in ((), (3,), (2,), (2, 3))]
    assert len(seen) == 4
    assert all(any(np.array_equal(one, other) for other in seen) for one in expected)


@pytest.mark.parametrize("mode", ["flips", "d4"])
def test_the_prediction_of_a_transformed_image_is_the_transformed_prediction(mode: Tta):
    model = network()
    with torch.inference_mode():
        straight = mean_probs(model, IMAGES, mode)
        for turns, mirrored in SYMMETRIES[mode]:
            turned = torch.rot90(IMAGES.flip(-1) if mirrored else IMAGES, turns, dims=(-2, -1))
            expected = torch.rot90(straight.flip(-1) if mirrored else straight, turns, dims=(-2, -1))
            torch.testing.assert_close(mean_probs(model, turned, mode), expected, atol=2e-6, rtol=0)
        assert (straight - mean_probs(model, IMAGES, "off")).abs().max() > 1e-3  # else nothing was averaged


def test_an_image_that_is_no_square_keeps_its_shape():
    wide = IMAGES[..., :16, :]
    with torch.inference_mode():
        assert mean_probs(network(), wide, "d4").shape == (2, 1, 16, 32)


def test_half_precision_logits_give_float32_probs():
    probs = mean_probs(lambda images: images[:, :1].bfloat16(), IMAGES, "d4")
    assert probs.dtype == torch.float32
    assert 0 <= probs.min() < probs.max() <= 1
