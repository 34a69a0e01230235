"""`isicdist.load_model`: a saved model as other people's programs use it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import isicdist
from isicdist.errors import CheckpointError
from isicdist.network import best as best_model
from isicdist.network.unet import ImprovedUNet

CARD = {
    "architecture": {"base_channels": 2},
    "size": 32,
    "fit": "pad",
    "mean": (0.7, 0.5, 0.4),
    "std": (0.2, 0.1, 0.3),
    "threshold": 0.375,
    "step": 9,
}


@pytest.fixture
def best(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    best_model.save_best(tmp_path / "run", ImprovedUNet(base_channels=2), CARD)
    return tmp_path / "run" / "best"


def test_images_go_in_as_they_are_and_probabilities_come_out(best):
    model = isicdist.load_model(best)
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    probs = model(images)
    assert (probs.shape, probs.dtype, probs.requires_grad) == ((2, 1, 32, 48), torch.float32, False)
    network, _ = best_model.load_model(best)
    by_hand = (images / 255 - torch.tensor(CARD["mean"]).view(3, 1, 1)) / torch.tensor(CARD["std"]).view(3, 1, 1)
    torch.testing.assert_close(probs, network(by_hand).sigmoid())
    mirrored = (probs + model(images.flip(-1)).flip(-1) + model(images.flip(-2)).flip(-2)) / 4
    mirrored += model(images.flip(-1, -2)).flip(-1, -2) / 4
    torch.testing.assert_close(model(images, tta="flips"), mirrored)
    assert not model.training
    assert (model.threshold, model.view, model.card["step"]) == (0.375, ("pad", 32), 9)


def test_the_documented_way_from_a_picture_to_its_mask(best):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8))
    model = isicdist.load_model(best)
    fit = model.fit(picture.height, picture.width)
    images = torch.tensor(fit.resize_image(picture)).permute(2, 0, 1)[None]
    probs = fit.restore(model(images)[0, 0].numpy())
    assert images.shape == (1, 3, 32, 32)
    assert probs.shape == (50, 90)
    assert 0 < (probs > model.threshold).mean() < 1


def test_images_that_are_no_bytes_or_of_another_shape_are_refused(best):
    model = isicdist.load_model(best)
    with pytest.raises(TypeError, match=r"torch.float32: give uint8, 0 to 255"):
        model(torch.rand(1, 3, 32, 32))
    with pytest.raises(ValueError, match="multiples of 16"):
        model(torch.zeros((1, 3, 32, 40), dtype=torch.uint8))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"threshold": None}, "float"),
        ({"fit": "squeeze"}, "squeeze"),
        ({"size": 40}, "40 pixels"),
        ({"mean": None}, "NoneType"),
        ({"std": ...}, "std"),
    ],
)
def test_a_card_that_lacks_something_is_named_in_one_line(best, change, said):
    card = {**json.loads((best / "model.json").read_text()), **change}
    (best / "model.json").write_text(json.dumps({name: value for name, value in card.items() if value is not ...}))
    with pytest.raises(CheckpointError, match=said) as caught:
        isicdist.load_model(best)
    assert str(best) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_paths_and_damage_are_named_in_one_line(best, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(best, damaged)
    data = bytearray((damaged / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(data)
    for path, said in ((tmp_path / "none", "no such folder"), (tmp_path, "no best model"), (damaged, "damaged")):
        with pytest.raises(CheckpointError, match=said) as caught:
            isicdist.load_model(path)
        assert str(path) in str(caught.value)


def test_the_package_brings_no_torch_until_it_is_asked_to():
    script = (
        "import sys, isicdist\n"
        "assert 'torch' not in sys.modules\n"
        "assert 'load_model' in isicdist.__all__ and not hasattr(isicdist, 'load_modle')\n"
        "from isicdist import load_model\n"
        "assert 'torch' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
