"""Build from what people bring: several archives, folders of archives, masks with the names of their images."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from shards.build import build
from shards.errors import SourceError, UsageError
from shards.inputs.match import BadInputError
from shards.planning.plan import BuildOptions
from shards.reader import ShardSet
from tests.shards.conftest import write_pair
from tests.shards.test_cli import run

OPTIONS = BuildOptions(size=32, split="train=1")


@pytest.fixture
def pictures(tmp_path) -> tuple[Path, Path]:
    """Six pairs, images and masks in folders of their own, with the names of ISIC."""
    for number in range(6):
        write_pair(tmp_path / "all", f"ISIC_{number:07}", seed=number)
    for name, pattern in (("images", "*.jpg"), ("masks", "*_segmentation.png")):
        (tmp_path / name).mkdir()
        for path in (tmp_path / "all").glob(pattern):
            shutil.move(path, tmp_path / name / path.name)
    return tmp_path / "images", tmp_path / "masks"


def keys(folder: Path) -> set[str]:
    split = ShardSet.open(folder).split("train")
    return {split.key(index) for index in range(len(split))}


def zipped(folder: Path, out: Path, names: list[str]) -> Path:
    out.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(out, "w") as archive:
        for name in names:
            archive.write(folder / name, name)
    return out


def test_several_archives_and_a_folder_of_archives_are_one_source(pictures, tmp_path):
    images, masks = pictures
    names = sorted(path.name for path in images.iterdir())
    parts = [zipped(images, tmp_path / "zips" / f"part{n}.zip", names[n::2]) for n in (0, 1)]
    build([str(part) for part in parts], str(masks), tmp_path / "several", OPTIONS, workers=1)
    build(str(tmp_path / "zips"), [str(masks)], tmp_path / "folder", OPTIONS, workers=1)
    build(str(images), str(masks), tmp_path / "plain", OPTIONS, workers=1)
    for name in ("several", "folder"):
        assert keys(tmp_path / name) == keys(tmp_path / "plain")
    words = ("--images", parts[0], "--images", parts[1], "--masks", masks, "--out", tmp_path / "cli")
    assert run("build", *words, "--size", "32", "--split", "train=1", "--workers", "1") == 0
    assert keys(tmp_path / "cli") == keys(tmp_path / "plain")


def test_masks_may_have_the_names_of_their_images(pictures, tmp_path):
    images, masks = pictures
    for path in list(masks.iterdir()):
        path.rename(masks / path.name.replace("_segmentation", ""))
    build(str(images), str(masks), tmp_path / "set", OPTIONS, workers=1)
    assert len(keys(tmp_path / "set")) == 6
    with pytest.raises(SourceError, match=r"no pair can be used: 12 files are rejected .*duplicate-key"):
        build(str(tmp_path), str(tmp_path), tmp_path.parent / f"{tmp_path.name}-other", OPTIONS, workers=1)


def test_downsampled_images_have_the_masks_of_their_originals(pictures, tmp_path):
    images, masks = pictures
    for path in sorted(images.iterdir())[:3]:
        path.rename(path.with_stem(f"{path.stem}_downsampled"))
    build(str(images), str(masks), tmp_path / "set", OPTIONS, workers=1)
    assert keys(tmp_path / "set") == {f"ISIC_{number:07}" for number in range(6)}


def test_a_dangling_link_is_a_bad_input_that_can_be_skipped(pictures, tmp_path):
    images, masks = pictures
    (images / "ISIC_0000000.jpg").unlink()
    (images / "ISIC_0000000.jpg").symlink_to(tmp_path / "gone.jpg")
    with pytest.raises(
        BadInputError, match=r"first: ISIC_0000000.jpg: unreadable, a link to a file that does not exist"
    ):
        build(str(images), str(masks), tmp_path / "set", OPTIONS, workers=1)
    skipping = BuildOptions(size=32, split="train=1", on_bad_input="skip")
    build(str(images), str(masks), tmp_path / "set", skipping, workers=1)
    assert len(keys(tmp_path / "set")) == 5


def test_the_culprit_is_named_before_its_partner(pictures, tmp_path):
    images, masks = pictures
    (masks / "ISIC_0000003_segmentation.png").write_bytes(b"torn")
    with pytest.raises(BadInputError, match=r"first: ISIC_0000003_segmentation.png: unreadable"):
        build(str(images), str(masks), tmp_path / "set", OPTIONS, workers=1)


def test_a_table_of_groups_that_names_a_part_of_the_packed_images_says_so(pictures, tmp_path, capsys):
    images, masks = pictures
    (images / "ISIC_0000000.jpg").write_bytes(b"")
    table = "".join(f"ISIC_{number:07},L{number}\n" for number in range(5))
    (tmp_path / "groups.csv").write_text("isic_id,lesion_id\n" + table)
    groups = f"{tmp_path}/groups.csv:lesion_id"
    words = ("--images", images, "--masks", masks, "--out", tmp_path / "set", "--groups", groups)
    options = ("--size", "32", "--split", "train=1", "--workers", "1", "--on-bad-input", "skip")
    assert run("build", *words, *options) == 0
    assert "--groups names 4 of the 5 images; each of the others is a group of its own" in capsys.readouterr().out


def test_a_set_inside_of_its_source_is_no_source(pictures, tmp_path):
    images, masks = pictures
    for complete in (False, True):
        result = build(str(images), str(masks), images / "sets" / "set", OPTIONS, workers=1)
        assert result.already_complete is complete
        assert result.index.counts.ignored == 0


def test_a_build_that_fails_deletes_no_file_of_others(pictures, tmp_path):
    images, masks = pictures
    (images / "ISIC_0000000.jpg").write_bytes(b"")
    out = tmp_path / "set"

    def killed(done: int, total: int, title: str = "") -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(str(images), str(masks), out, OPTIONS, workers=1, report=killed)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(BadInputError):
        build(str(images), str(masks), out, OPTIONS, workers=1)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_official_archives_give_the_splits(pictures, tmp_path):
    images, masks = pictures
    names = sorted(path.name for path in images.iterdir())
    parts = {"Training": names[:3], "Validation": names[3:5], "Test": names[5:]}
    archives = [
        str(zipped(images, tmp_path / "official" / f"ISIC2018_Task1-2_{name}_Input.zip", part))
        for name, part in parts.items()
    ]
    options = BuildOptions(size=32, split_archives=True)
    build(archives, str(masks), tmp_path / "set", options, workers=1)
    splits = ShardSet.open(tmp_path / "set").index.splits
    assert {name: split.samples for name, split in splits.items()} == {"train": 3, "val": 2, "test": 1}
    with pytest.raises(UsageError, match="images says no split; it must have one of Training, Validation and Test"):
        build(str(images), str(masks), tmp_path / "other", options, workers=1)
    with pytest.raises(UsageError, match="--split-archives: give it alone"):
        BuildOptions(split_archives=True, split="train=1")


def test_ph2_is_built_as_it_is_unpacked(tmp_path):
    for number in range(4):
        write_pair(tmp_path / "flat", f"IMD{number:03}", seed=number)
        folder = tmp_path / "PH2 Dataset images" / f"IMD{number:03}"
        for part, source, name in (
            ("Dermoscopic_Image", ".jpg", ""),
            ("lesion", "_segmentation.png", "_lesion"),
            ("roi", "_segmentation.png", "_R1_Label3"),
        ):
            path = folder / f"{folder.name}_{part}" / f"{folder.name}{name}.bmp"
            path.parent.mkdir(parents=True)
            with Image.open(tmp_path / "flat" / f"{folder.name}{source}") as picture:
                picture.save(path)
    (tmp_path / "PH2 Dataset images" / "PH2_dataset.txt").write_text("table")
    place = str(tmp_path / "PH2 Dataset images")
    options = BuildOptions(size=32, split="train=1", mask_suffix="_lesion")
    result = build(place, place, tmp_path / "set", options, workers=1)
    assert (result.index.counts.packed, result.index.counts.ignored, result.index.counts.rejected) == (8, 5, 0)
