"""`isicdist.load_model`: a saved model as other people's programs use it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import isicdist
from isicdist.config import ModelConfig
from isicdist.errors import CheckpointError
from isicdist.network.best import ModelMetadata, ValidationScore, load_best, save_best
from isicdist.network.unet import ImprovedUNet

METADATA = ModelMetadata(
    architecture=ModelConfig(base_channels=2),
    size=32,
    fit="pad",
    mean=(0.7, 0.5, 0.4),
    std=(0.2, 0.1, 0.3),
    threshold=0.375,
    score=ValidationScore(mean_dice=0.75),
    step=9,
    data_digest="0123",
)


@pytest.fixture
def best(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_best(tmp_path / "run", ImprovedUNet(base_channels=2), METADATA)
    return tmp_path / "run" / "best"


def test_images_go_in_as_they_are_and_probabilities_come_out(best):
    model = isicdist.load_model(best)
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    probs = model(images)
    assert (probs.shape, probs.dtype, probs.requires_grad) == ((2, 1, 32, 48), torch.float32, False)
    network, _ = load_best(best)
    by_hand = (images / 255 - torch.tensor(METADATA.mean).view(3, 1, 1)) / torch.tensor(METADATA.std).view(3, 1, 1)
    torch.testing.assert_close(probs, network(by_hand).sigmoid())
    mirrored = (probs + model(images.flip(-1)).flip(-1) + model(images.flip(-2)).flip(-2)) / 4
    mirrored += model(images.flip(-1, -2)).flip(-1, -2) / 4
    torch.testing.assert_close(model(images, tta="flips"), mirrored)
    assert not model.training
    assert (model.threshold, model.input_spec, model.metadata.step) == (0.375, ("pad", 32), 9)


def photograph(height: int = 50, width: int = 90) -> Image.Image:
    """A picture with more structure than noise, so that its prediction changes under mirroring."""
    noise = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR)


def test_a_mask_has_the_pictures_own_resolution(best):
    picture, model = photograph(), isicdist.load_model(best)
    plan = model.resize_plan(picture.height, picture.width)
    images = torch.tensor(plan.resize_image(picture)).permute(2, 0, 1)[None]
    assert images.shape == (1, 3, 32, 32)
    expected = plan.restore(model(images)[0, 0].numpy())
    probs, mask = model.predict_probs(picture), model.predict(picture)
    assert (probs.shape, probs.dtype, mask.dtype) == ((50, 90), np.float32, np.bool_)
    np.testing.assert_array_equal(probs, expected)
    np.testing.assert_array_equal(mask, expected > 0.375)
    assert 0 < mask.mean() < 1
    np.testing.assert_array_equal(model.predict(np.asarray(picture)), mask)
    assert (model.predict_probs(picture, "d4") != probs).any()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "1"])
def test_a_picture_of_any_mode_is_converted_to_rgb(best, mode):
    picture, model = photograph(), isicdist.load_model(best)
    if mode == "I;16":
        grey = picture.convert("L")
        converted = Image.fromarray(np.asarray(grey).astype(np.uint16) * 256 + 7)
        assert converted.mode == mode
        rgb = grey.convert("RGB")
    else:
        converted = picture.convert(mode)
        rgb = converted.convert("RGB")
    np.testing.assert_array_equal(model.predict_probs(converted), model.predict_probs(rgb))


def test_a_picture_is_turned_upright_by_its_exif_orientation(best, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    photograph().save(tmp_path / "turned.png", exif=exif)
    model = isicdist.load_model(best)
    with Image.open(tmp_path / "turned.png") as picture:
        probs = model.predict_probs(picture)
    assert probs.shape == (90, 50)
    np.testing.assert_array_equal(probs, model.predict_probs(photograph().transpose(Image.Transpose.ROTATE_270)))


def test_arrays_that_are_no_rgb_bytes_are_refused(best):
    model = isicdist.load_model(best)
    with pytest.raises(TypeError, match=r"picture of float64: give uint8"):
        model.predict(np.zeros((40, 50, 3)))
    for shape in ((40, 50), (3, 40, 50), (1, 40, 50, 3)):
        with pytest.raises(ValueError, match=r"give \(H, W, 3\)"):
            model.predict(np.zeros(shape, np.uint8))


def test_images_that_are_no_bytes_or_of_another_shape_are_refused(best):
    model = isicdist.load_model(best)
    with pytest.raises(TypeError, match=r"torch.float32: give uint8, 0 to 255"):
        model(torch.rand(1, 3, 32, 32))
    with pytest.raises(ValueError, match="multiples of 16"):
        model(torch.zeros((1, 3, 32, 40), dtype=torch.uint8))


def test_a_model_that_is_not_there_is_named_in_one_line(best, tmp_path):
    with pytest.raises(CheckpointError, match="no such folder") as caught:
        isicdist.load_model(tmp_path / "none")
    assert "\n" not in str(caught.value)


def test_public_names_are_imported_on_first_use():
    script = (
        "import sys, isicdist\n"
        "isicdist.TrainConfig, isicdist.BatchPlan, isicdist.CheckpointError\n"
        "assert 'torch' not in sys.modules\n"
        "assert 'load_model' in dir(isicdist) and not hasattr(isicdist, 'load_modle')\n"
        "from isicdist import *\n"
        "assert load_model.__module__ == Segmenter.__module__ == 'isicdist.network.segmenter'\n"
        "assert 'torch' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
