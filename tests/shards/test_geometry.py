"""Resize plans and outlines."""

from __future__ import annotations

import numpy as np
import pytest

from shards.geometry import RESIZE_MODES, ResizePlan, mask_outline


@pytest.mark.parametrize(
    ("mode", "source", "target"),
    [
        ("stretch", (0, 0, 160, 96), (0, 0, 64, 64)),
        ("pad", (0, 0, 160, 96), (0, 13, 64, 51)),
        ("crop", (32, 0, 128, 96), (0, 0, 64, 64)),
    ],
)
def test_a_plan_maps_the_source_box_to_the_target_box(mode, source, target):
    plan = ResizePlan.of(mode, 96, 160, 64)
    assert (plan.source, plan.target) == (source, target)
    assert ResizePlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("mode", RESIZE_MODES)
def test_a_mask_of_the_whole_square_covers_the_source_box_when_restored(mode):
    plan = ResizePlan.of(mode, 96, 160, 64)
    restored = plan.restore(np.ones(plan.size, np.float32))
    left, top, right, bottom = plan.source
    expected = np.zeros((96, 160), np.float32)
    expected[top:bottom, left:right] = 1
    np.testing.assert_array_equal(restored, expected)


def test_the_border_of_a_padded_image_does_not_fade_into_what_is_restored():
    plan = ResizePlan.of("pad", 97, 160, 64)
    left, top, right, bottom = plan.target
    probs = np.zeros(plan.size, np.float32)
    probs[top:bottom, left:right] = 1
    assert plan.restore(probs).min() == 1


def test_without_a_side_nothing_is_resized():
    plan = ResizePlan.of("pad", 96, 160, None)
    mask = np.tri(96, 160, dtype=np.uint8)
    assert plan.mode == "original"
    np.testing.assert_array_equal(plan.resize_mask(mask), mask)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="'squeeze' is none of stretch, pad, crop"):
        ResizePlan.of("squeeze", 96, 160, 64)


@pytest.mark.parametrize("width", [1, 2])
def test_an_outline_is_within_its_width_of_the_boundary(width):
    mask = np.zeros((12, 12), dtype=bool)
    mask[:7, 2:9] = True  # it runs along the upper border of the image, too
    inner = np.zeros_like(mask)
    inner[width : 7 - width, 2 + width : 9 - width] = True
    np.testing.assert_array_equal(mask_outline(mask, width), mask & ~inner)


def test_an_empty_mask_has_no_outline():
    assert not mask_outline(np.zeros((9, 9), dtype=bool), 2).any()


def test_a_narrow_picture_keeps_a_pixel_and_half_a_pixel_is_lesion():
    assert ResizePlan.of("pad", 10, 4000, 64).target == (0, 31, 64, 32)
    mask = np.zeros((128, 128), np.uint8)
    mask[:, ::2] = 1
    assert ResizePlan.of("stretch", 128, 128, 64).resize_mask(mask).all()
    mask[::2, ::2] = 0
    assert not ResizePlan.of("stretch", 128, 128, 64).resize_mask(mask).any()
