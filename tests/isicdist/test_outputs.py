"""A submission to ISIC 2018 Task 1, as the challenge reads it."""

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
from isicdist.predict import predict
from shards.errors import SourceError

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
