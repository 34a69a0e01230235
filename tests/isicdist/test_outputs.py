"""Files of a prediction, and a submission to ISIC 2018 Task 1 as the challenge reads it."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from isicdist.config import ModelConfig
from isicdist.network.best import ModelMetadata, ValidationScore, save_best
from isicdist.network.unet import ImprovedUNet
from isicdist.outputs import Outputs, overlay_of
from isicdist.predict import predict
from shards.errors import SourceError
from shards.inputs.source import File

METADATA = ModelMetadata(
    architecture=ModelConfig(base_channels=2),
    size=32,
    fit="stretch",
    mean=(0.7, 0.5, 0.4),
    std=(0.2, 0.1, 0.3),
    threshold=0.5,
    score=ValidationScore(mean_dice=0.75),
    step=9,
    data_digest="0123",
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_best(tmp_path / "run", ImprovedUNet(base_channels=2), METADATA)
    return tmp_path / "run"


@pytest.fixture
def images(tmp_path: Path, archive: tuple[Path, Path]) -> Path:
    (tmp_path / "images").mkdir()
    for path in sorted(archive[0].glob("*.jpg"))[:4]:
        shutil.copy(path, tmp_path / "images")
    return tmp_path / "images"


def test_the_files_hold_threshold_and_probabilities(tmp_path):
    outputs, file = Outputs(folder=tmp_path, probabilities=True), File(0, "photographs/ISIC_1.jpg", 9)
    probs = np.array([[0, 0.25, 0.5], [0.50001, 0.75, 1]], np.float32)
    outputs.make_folders()
    outputs.write(file, probs, 0.5, None)
    with Image.open(outputs.mask(file)) as mask, Image.open(tmp_path / "probabilities" / "ISIC_1.png") as values:
        assert np.asarray(mask).tolist() == [[0, 0, 0], [255, 255, 255]]
        assert np.asarray(values).tolist() == [[0, 63, 127], [128, 191, 255]]  # v/256 < p <= (v+1)/256
    assert {path.name for path in tmp_path.rglob("*.*")} == {"ISIC_1_segmentation.png", "ISIC_1.png"}


def test_an_image_is_complete_with_all_requested_files_as_new_as_it(tmp_path):
    outputs, file = Outputs(folder=tmp_path, overlay=True), File(0, "ISIC_1.jpg", 9)
    outputs.make_folders()
    assert not outputs.are_complete(file)
    outputs.write(file, np.ones((4, 4), np.float32), 0.5, np.zeros((4, 4, 3), np.uint8))
    assert outputs.are_complete(file)
    assert not Outputs(folder=tmp_path, probabilities=True).are_complete(file)
    written = (tmp_path / "overlays" / "ISIC_1.jpg").stat().st_mtime_ns
    assert not outputs.are_complete(File(0, "ISIC_1.jpg", 9, changed=written + 10**9))
    (tmp_path / "overlays" / "ISIC_1.jpg").unlink()
    assert not outputs.are_complete(file)


def test_an_outline_is_drawn_on_a_copy():
    picture, mask = np.zeros((9, 9, 3), np.uint8), np.zeros((9, 9), bool)
    mask[2:7, 2:7] = True
    drawn = overlay_of(picture, mask)
    outline = mask.copy()
    outline[3:6, 3:6] = False
    assert (drawn[outline] == (0, 229, 255)).all()
    assert not drawn[~outline].any()
    assert not picture.any()


def test_a_flat_archive_with_one_grey_mask_of_each_image(run, images, tmp_path):
    path = tmp_path / "sent" / "submission.zip"
    predict([run], str(images), tmp_path / "out", submission=path)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [f"{image.stem}_segmentation.png" for image in sorted(images.glob("*.jpg"))]
        for name in archive.namelist():
            with archive.open(name) as file, Image.open(file) as mask:
                assert (mask.format, mask.mode) == ("PNG", "L")
                assert set(np.unique(np.asarray(mask))) <= {0, 255}
                with Image.open(images / f"{name.removesuffix('_segmentation.png')}.jpg") as image:
                    assert mask.size == image.size
            assert archive.read(name) == (tmp_path / "out" / name).read_bytes()
    first = path.read_bytes()
    (tmp_path / "out" / "ISIC_0000001_segmentation.png").write_bytes(b"of an image that is gone")
    predict([run], str(images), tmp_path / "out", submission=path)
    assert path.read_bytes() == first
    assert [each.name for each in path.parent.iterdir()] == ["submission.zip"]


@pytest.mark.filterwarnings("ignore")  # the scorer's own
def test_the_challenges_own_scorer_reads_it(run, images, archive, tmp_path):
    scoring = pytest.importorskip("isic_challenge_scoring", exc_type=ImportError)
    predict([run], str(images), tmp_path / "out", submission=tmp_path / "submission.zip")
    truth = tmp_path / "truth.zip"
    with zipfile.ZipFile(truth, "w") as packed:
        for image in images.glob("*.jpg"):
            packed.write(archive[1] / f"{image.stem}_segmentation.png", f"{image.stem}_segmentation.png")
    score = scoring.SegmentationScore.from_zip_file(truth, tmp_path / "submission.zip")
    dice = []
    for image in images.glob("*.jpg"):
        pair = [archive[1] / f"{image.stem}_segmentation.png", tmp_path / "out" / f"{image.stem}_segmentation.png"]
        one, two = (np.asarray(Image.open(path)) > 128 for path in pair)
        dice.append(2 * (one & two).sum() / (one.sum() + two.sum()))
    assert score.macro_average["dice"] == pytest.approx(np.mean(dice), rel=1e-12)


def test_an_image_of_another_name_stops_it_before_the_work(run, images, tmp_path):
    (images / "ISIC_9000000.jpg").rename(images / "holiday.jpg")
    with pytest.raises(SourceError, match=r"holiday.jpg: .* ISIC_ and seven digits"):
        predict([run], str(images), tmp_path / "out", submission=tmp_path / "submission.zip")
    assert not (tmp_path / "out").exists()


def test_an_image_without_a_mask_makes_it_incomplete(run, images, tmp_path):
    (images / "ISIC_9000001.jpg").write_bytes(b"no jpeg")
    with pytest.raises(SourceError, match=r"not written, as 1 of the images have no mask; see .*rejected.csv"):
        predict([run], str(images), tmp_path / "out", submission=tmp_path / "submission.zip")
    assert not (tmp_path / "submission.zip").exists()
    assert len(list((tmp_path / "out").glob("*.png"))) == 3
