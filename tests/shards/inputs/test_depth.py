"""Pictures of 16 bits per channel are read at full depth, and reduced by the range that they use."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.inputs.decode import load_image, upright_rgb
from shards.inputs.depth import BIT_DEPTHS, excess_bits, reduce_to_8_bits, split_alpha, wide_values
from shards.inputs.source import File, FolderSource
from tests.shards.conftest import photograph
from tests.shards.inputs.pictures import png_bytes, write_png


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_every_sample_of_16_bits_is_read(channels: int, interlaced: bool):
    expected = np.random.default_rng(0).integers(0, 1 << 16, (13, 9, channels))
    picture = Image.open(io.BytesIO(png_bytes(expected, interlaced=interlaced)))
    values = wide_values(picture)
    assert values is not None
    np.testing.assert_array_equal(values, expected)
    colours, alpha = split_alpha(values)
    np.testing.assert_array_equal(colours, expected[..., : 1 if channels < 3 else 3])
    assert (alpha is None) == (channels % 2 == 1)
    picture.load()  # its own position in the file is unchanged


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_a_picture_of_8_bits_has_no_wide_values(mode: str):
    assert wide_values(Image.new(mode, (3, 2))) is None


@pytest.mark.parametrize(
    ("highest", "bits"), [(0, 8), (255, 8), (256, 10), (1023, 10), (1024, 12), (4095, 12), (16383, 14), (16384, 16)]
)
def test_the_bit_depth_is_the_least_that_holds_the_highest_value(highest: int, bits: int):
    assert excess_bits(np.array([0, highest], np.uint16)) == bits - 8
    assert reduce_to_8_bits(np.array([highest], np.uint16))[0] == highest >> (bits - 8)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("bits", BIT_DEPTHS)
def test_a_picture_of_any_bit_depth_shows_what_the_same_one_of_8_bits_shows(tmp_path: Path, bits: int, channels: int):
    rgb = photograph(1).astype(np.uint16)
    rgb[0, 0] = 255
    colours = rgb if channels >= 3 else rgb[..., :1]
    values = colours << (bits - 8) | colours >> (16 - bits if bits > 8 else 8)
    if channels % 2 == 0:
        values = np.concatenate([values, np.full_like(values[..., :1], 65535)], axis=2)
    write_png(tmp_path / "A.png", values)
    image, _ = load_image(File(0, "A.png", 1), [FolderSource(str(tmp_path))], "stretch", None)
    np.testing.assert_array_equal(np.asarray(image), np.broadcast_to(colours, rgb.shape))
    with Image.open(tmp_path / "A.png") as picture:
        np.testing.assert_array_equal(np.asarray(upright_rgb(picture)), np.asarray(image))


def test_a_black_picture_of_16_bits_stays_black(tmp_path: Path):
    write_png(tmp_path / "A.png", np.zeros((4, 5), np.uint16))
    image, _ = load_image(File(0, "A.png", 1), [FolderSource(str(tmp_path))], "stretch", None)
    assert image.getextrema() == ((0, 0),) * 3
