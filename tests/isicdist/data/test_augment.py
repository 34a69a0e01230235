"""Augmentation: a pure function of the key, the same for image and mask, within the ranges of the config."""

from __future__ import annotations

import io
import zipfile
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from isicdist.config import AugmentConfig
from isicdist.data.augment import augment
from isicdist.data.order import Purpose, random_keys
from isicdist.network.normalise import MEAN, STD, normalise, to_unit

NEUTRAL = AugmentConfig(
    rotation=0.0, scale=(1.0, 1.0), elastic=0.0, contrast=(1.0, 1.0), gamma=(1.0, 1.0), brightness=0.0
)
SIDE = 96


def keys(count: int, seed: int = 3) -> np.ndarray:
    return random_keys(seed, 0, np.arange(count), Purpose.AUGMENT)


@pytest.fixture
def noise() -> tuple[Tensor, Tensor]:
    """8 images and masks of smooth noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand((8, 3, 9, 9), generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear")
    return images, (images[:, :1] > 0.5).to(torch.uint8)


def disc(count: int) -> Tensor:
    """A disc off the centre, bool (count, 1, SIDE, SIDE)."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    return ((y - 40) ** 2 + (x - 56) ** 2 < 20**2).expand(count, 1, SIDE, SIDE)


def test_what_happens_to_a_sample_depends_on_its_key_alone(noise):
    images, masks = noise
    one, one_mask = augment(images, masks, keys(8), AugmentConfig())
    order = torch.tensor([5, 2, 7, 0, 1, 3, 6, 4])
    other, other_mask = augment(images[order], masks[order], keys(8)[order.numpy()], AugmentConfig())
    assert torch.equal(other_mask, one_mask[order])
    torch.testing.assert_close(other, one[order], rtol=0, atol=1e-6)
    alone, alone_mask = augment(images[3:4], masks[3:4], keys(8)[3:4], AugmentConfig())
    assert torch.equal(alone_mask[0], one_mask[3])
    torch.testing.assert_close(alone[0], one[3], rtol=0, atol=1e-6)


def test_no_generator_is_consumed(noise):
    torch_state, numpy_state = torch.get_rng_state(), str(np.random.get_state(legacy=False))
    augment(noise[0], noise[1], keys(8), AugmentConfig())
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert str(np.random.get_state(legacy=False)) == numpy_state


def test_other_keys_do_something_else(noise):
    images, masks = noise
    same = images[:1].expand(8, -1, -1, -1)
    out, _ = augment(same, masks[:1].expand(8, -1, -1, -1), keys(8), AugmentConfig())
    apart = (out[:, None] - out[None]).abs().mean(dim=(2, 3, 4)) + torch.eye(8)
    assert apart.min() > 0.01
    assert not torch.equal(out, augment(same, masks, keys(8, seed=4), AugmentConfig())[0])


def test_values_stay_in_their_range_and_the_mask_stays_a_mask(noise):
    images, masks = noise
    out, moved = augment(images, masks, keys(8), AugmentConfig())
    assert out.shape == images.shape
    assert out.dtype == images.dtype
    assert 0 <= out.min() < out.max() <= 1
    assert moved.shape == masks.shape
    assert moved.dtype == torch.uint8
    assert set(moved.unique().tolist()) == {0, 1}


def test_the_mask_moves_with_the_image():
    """A bright disc on black, its colours left alone: where the image is bright afterwards, the mask is 1."""
    shape = disc(32)
    config = AugmentConfig(contrast=(1.0, 1.0), gamma=(1.0, 1.0), brightness=0.0)
    out, moved = augment(shape.float().expand(-1, 3, -1, -1), shape.to(torch.uint8), keys(32), config)
    bright, inside = out[:, :1] > 0.5, moved > 0
    iou = (bright & inside).sum((1, 2, 3)) / (bright | inside).sum((1, 2, 3))
    assert iou.min() > 0.95
    unmoved = (shape & inside).sum((1, 2, 3)) / (shape | inside).sum((1, 2, 3))
    assert unmoved.median() < 0.8


def test_a_neutral_config_only_mirrors_and_turns(noise):
    """Each of the 8 symmetries of the square, pixel by pixel."""
    images, masks = (part[:1].expand(64, -1, -1, -1) for part in noise)
    out, moved = augment(images, masks, keys(64), NEUTRAL)
    ways = [(turns, mirrored) for turns in range(4) for mirrored in (False, True)]

    def symmetry(part: Tensor, way: tuple[int, bool]) -> Tensor:
        return torch.rot90(part.flip(-1) if way[1] else part, way[0], dims=(-2, -1))

    seen = []
    for image, mask in zip(out, moved, strict=True):
        way = min(ways, key=lambda way: float((image - symmetry(images[0], way)).abs().max()))
        torch.testing.assert_close(image, symmetry(images[0], way), rtol=0, atol=1e-4)
        assert torch.equal(mask, symmetry(masks[0], way))
        seen.append(way)
    assert {seen.count(way) > 2 for way in ways} == {True}


def test_a_smaller_side_shows_the_same_with_fewer_pixels():
    shape = disc(32)
    batch = (shape.float().expand(-1, 3, -1, -1), shape.to(torch.uint8), keys(32), AugmentConfig())
    whole, small = augment(*batch), augment(*batch, SIDE // 2)
    for one, other, most in zip(whole, small, (0.03, 0.02), strict=True):
        assert other.shape[2:] == (SIDE // 2, SIDE // 2)
        assert (torch.nn.functional.avg_pool2d(one.float(), 2) - other).abs().mean() < most
    assert set(small[1].unique().tolist()) == {0, 1}


def test_scale_is_a_zoom_factor_within_its_bounds():
    shape = disc(64)
    config = replace(NEUTRAL, scale=(0.75, 1.25))
    _, moved = augment(shape.float().expand(-1, 3, -1, -1), shape.to(torch.uint8), keys(64), config)
    zoom = (moved.sum((1, 2, 3)) / shape[0].sum()).sqrt()
    assert 0.74 < zoom.min() < 0.8
    assert 1.2 < zoom.max() < 1.26


def test_rotation_stays_within_its_angle_of_a_quarter_turn():
    shape = disc(128)
    config = replace(NEUTRAL, rotation=20.0)
    _, moved = augment(shape.float().expand(-1, 3, -1, -1), shape.to(torch.uint8), keys(128), config)
    centre = (SIDE - 1) / 2
    place = torch.arange(SIDE) - centre
    weight = moved[:, 0].float()
    x, y = ((weight * grid).sum((1, 2)) / weight.sum((1, 2)) for grid in (place, place[:, None]))
    angle = np.rad2deg(torch.atan2(y, x).numpy())
    start = np.rad2deg(np.arctan2(40 - centre, 56 - centre))
    starts = np.array([way + 90 * turns for turns in range(4) for way in (start, 180 - start)])
    apart = (angle[:, None] - starts + 180) % 360 - 180  # (128, 8): from each symmetry, in degrees
    nearest = np.take_along_axis(apart, np.abs(apart).argmin(1)[:, None], axis=1)
    assert np.abs(nearest).max() < 20.5
    assert nearest.min() < -10 < 10 < nearest.max()


def test_colours_change_as_the_config_says():
    """On rings of one colour, which mirroring and turning leave alone."""
    place = torch.linspace(-1, 1, SIDE)
    ramp = (0.3 + 0.2 * (place[:, None] ** 2 + place**2)).expand(4, 3, SIDE, SIDE)
    mean = ramp[0].mean()
    masks = torch.zeros((4, 1, SIDE, SIDE), dtype=torch.uint8)

    def coloured(**change: Any) -> Tensor:
        return augment(ramp, masks, keys(4), replace(NEUTRAL, **change))[0]

    torch.testing.assert_close(coloured(gamma=(1.5, 1.5)), ramp**1.5, rtol=0, atol=1e-4)
    torch.testing.assert_close(coloured(contrast=(1.4, 1.4)), (ramp - mean) * 1.4 + mean, rtol=0, atol=1e-4)
    shift = (coloured(brightness=0.1) - ramp).mean(dim=(1, 2, 3))
    assert len(set(shift.tolist())) == 4
    assert 0 < shift.abs().max() <= 0.1001


def test_hue_and_saturation_are_those_of_each_pixel_and_leave_grey_alone(noise):
    """Against the colour wheel by hand: the plane across the grey axis, turned and stretched."""
    masks = torch.zeros((8, 1, SIDE, SIDE), dtype=torch.uint8)
    flat = 0.4 + 0.2 * noise[0][:, :, :1, :1].expand(-1, -1, SIDE, SIDE)  # one colour per image: nothing moves

    def coloured(images: Tensor, **change: Any) -> Tensor:
        return augment(images, masks, keys(8), replace(NEUTRAL, **change))[0]

    grey = flat[:, :1].expand(-1, 3, -1, -1)
    torch.testing.assert_close(coloured(grey, hue=90.0, saturation=(0.5, 2.0)), grey)
    mean = flat.mean(dim=1, keepdim=True)
    torch.testing.assert_close(coloured(flat, saturation=(1.5, 1.5)), mean + 1.5 * (flat - mean))
    before, after = (part[:, :, 0, 0] for part in (flat - mean, coloured(flat, hue=30.0) - mean))  # (8, 3)
    torch.testing.assert_close(after.norm(dim=1), before.norm(dim=1))
    torch.testing.assert_close(after.sum(dim=1), torch.zeros(8), rtol=0, atol=1e-5)
    turn = torch.rad2deg(torch.acos(torch.cosine_similarity(before, after)))
    assert 15 < turn.max() < 30.1
    assert len(set(turn.round(decimals=2).tolist())) == 8


def test_normalise_by_hand():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    unit = to_unit(images)
    torch.testing.assert_close(unit.flatten(), torch.tensor([0.0, 0.2, 1.0]))
    by_hand = [(value - m) / s for value, m, s in zip((0.0, 0.2, 1.0), MEAN, STD, strict=True)]
    torch.testing.assert_close(normalise(unit).flatten(), torch.tensor(by_hand))
    torch.testing.assert_close(normalise(unit, (0.0,) * 3, (0.5,) * 3).flatten(), torch.tensor([0.0, 0.4, 2.0]))


def test_mean_and_deviation_are_those_of_the_real_images(real_data):
    with zipfile.ZipFile(real_data / "ISIC2018_Task1-2_Training_Input_256.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".jpg")][::12]
        pictures = [Image.open(io.BytesIO(archive.read(name))).reduce(4) for name in names]
    unit = to_unit(torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2))
    scaled = normalise(unit)
    assert scaled.mean(dim=(0, 2, 3)).abs().max() < 0.1
    assert (scaled.std(dim=(0, 2, 3)) - 1).abs().max() < 0.1
