"""A set whose masks look wrong as a whole is warned of with numbers, and one without any lesion is not built."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.build import build
from shards.errors import SourceError
from shards.mask_statistics import mask_warnings, without_lesion
from shards.planning.plan import BuildOptions
from shards.reader import ShardSet, Split
from tests.shards.conftest import disc, photograph
from tests.shards.test_cli import run

OPTIONS = BuildOptions(size=32, split="train=1")
SAMPLES = 20


def pictures(folder: Path, masks: list[np.ndarray]) -> Path:
    folder.mkdir()
    for number, mask in enumerate(masks):
        Image.fromarray(photograph(number)).save(folder / f"ISIC_{number:07d}.jpg")
        Image.fromarray(mask).save(folder / f"ISIC_{number:07d}_segmentation.png")
    return folder


def built(tmp_path: Path, masks: list[np.ndarray]) -> Split:
    folder = pictures(tmp_path / "pictures", masks)
    build(str(folder), str(folder), tmp_path / "set", OPTIONS, allow_empty_masks=True)
    return ShardSet.open(tmp_path / "set").split("train")


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ([np.zeros_like(disc())] * SAMPLES, f"train: all {SAMPLES} masks are empty, so a Dice of it is no score"),
        ([np.zeros_like(disc())] * 19 + [disc()], "train: 19 of 20 masks are empty"),
        ([np.full_like(disc(), 255)] * 19 + [disc()], "train: 19 of 20 masks are all lesion"),
        ([255 - disc()] * SAMPLES, "train: lesion covers most of the border in 20 of 20 masks looked at"),
    ],
)
def test_masks_that_look_wrong_are_counted(tmp_path, masks, message):
    split = built(tmp_path, masks)
    assert mask_warnings(split)[0].startswith(message)
    assert without_lesion(split) is (not any(mask.any() for mask in masks))


def test_a_set_as_it_should_be_has_no_warning(tmp_path):
    assert mask_warnings(built(tmp_path, [np.zeros_like(disc())] * 4 + [disc()] * 16)) == []


def test_of_a_remote_split_one_shard_is_looked_at(tmp_path, monkeypatch):
    folder = pictures(tmp_path / "pictures", [255 - disc()] * SAMPLES)
    options = BuildOptions(size=32, split="train=1", samples_per_shard=4)
    build(str(folder), str(folder), tmp_path / "set", options)
    monkeypatch.setenv("ISICDIST_CACHE", str(tmp_path / "cache"))
    (warning,) = mask_warnings(ShardSet.open(f"file://{tmp_path}/set").split("train"))
    assert "in 4 of 4 masks looked at" in warning
    assert len(list((tmp_path / "cache").rglob("*.tar"))) == 1


def test_real_masks_have_no_warning(tmp_path, real_data):
    folder = real_data / "isic-original"
    build(str(folder / "images"), str(folder / "masks"), tmp_path / "set", OPTIONS)
    assert mask_warnings(ShardSet.open(tmp_path / "set").split("train")) == []


def test_a_set_without_any_lesion_is_built_only_on_request(tmp_path, capsys):
    folder = pictures(tmp_path / "pictures", [np.zeros_like(disc())] * 3)
    with pytest.raises(SourceError, match="all 3 masks are empty"):
        build(str(folder), str(folder), tmp_path / "set", OPTIONS)
    assert not (tmp_path / "set").exists() or not any((tmp_path / "set").iterdir())
    words = ("build", "--images", folder, "--masks", folder, "--out", tmp_path / "set", "--split", "train=1")
    assert run(*words, "--size", "32", "--allow-empty-masks") == 0
    assert "warning: train: all 3 masks are empty" in capsys.readouterr().err


def test_masks_that_were_copied_are_sampled(tmp_path):
    folder = pictures(tmp_path / "pictures", [np.zeros_like(disc())] * 19 + [disc()])
    build(str(folder), str(folder), tmp_path / "set", BuildOptions(size="original", split="train=1"), workers=1)
    (warning,) = mask_warnings(ShardSet.open(tmp_path / "set").split("train"))
    assert warning.startswith("train: 19 of 20 masks are empty")
