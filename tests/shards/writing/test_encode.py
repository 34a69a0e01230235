"""Encode one pair; and sets with --size original, whose pairs are copied where every reader can read them."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards import codecs, format
from shards.build import build
from shards.console import print_build, print_info
from shards.errors import SourceError
from shards.geometry import ResizePlan
from shards.inputs.match import BadInputError, Rejected, pair_files
from shards.inputs.source import open_sources
from shards.planning.plan import BuildOptions
from shards.reader import ShardSet
from shards.verify import verify
from shards.writing.encode import DeferredCopy, Sample, encode
from tests.shards.conftest import disc, write_pair

WHOLE = BuildOptions(size="original", split="train=0.5,val=0.5", samples_per_shard=9)
ODD = "ISIC_0000003"


@pytest.fixture
def folder(pictures: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pictures, tmp_path / "in"))


def packed(folder: Path, options: BuildOptions = WHOLE, workers: int = 1) -> ShardSet:
    out = folder.parent / f"set-{workers}"
    print_build(build(str(folder), str(folder), out, options, workers=workers))
    return ShardSet.open(out)


def encoded(folder: Path, options: BuildOptions, **keep: bool) -> Sample | DeferredCopy | list[Rejected]:
    """The pair ODD of a folder or archive, encoded."""
    sources, files = open_sources([str(folder)])
    (pair,) = (pair for pair in pair_files(files).pairs if pair.key == ODD)
    try:
        return encode(replace(pair, group="IL_7"), sources, options, **{"keep_original": True, **keep})
    finally:
        sources[0].close()


@pytest.mark.parametrize("keep_original", [True, False])
def test_a_decoded_pair_has_its_members_at_the_size_of_the_set(folder: Path, keep_original: bool):
    sample = encoded(folder, BuildOptions(size=32, fit="crop"), keep_original=keep_original)
    assert isinstance(sample, Sample)
    jpeg, metadata, mask, original = sample.members
    assert codecs.decode_image(jpeg).shape == (32, 32, 3)
    assert codecs.decode_mask(mask).shape == (32, 32)
    assert codecs.decode_mask(mask).sum() == sample.foreground
    assert sample.original == (60, 80)
    if keep_original:
        np.testing.assert_array_equal(codecs.decode_mask(original), disc() // 255)
    else:
        assert original == b""
    values = json.loads(metadata)
    assert (values["key"], values["group"], values["height"], values["width"]) == (ODD, "IL_7", 60, 80)
    assert (values["image"], values["mask"]) == (f"{ODD}.jpg", f"{ODD}_segmentation.png")
    assert ResizePlan.from_json(values["fit"]) == ResizePlan.of("crop", 60, 80, 32)


def test_a_copy_is_deferred_from_a_folder_and_made_at_once_from_an_archive(folder: Path):
    archive = Path(shutil.make_archive(str(folder), "zip", folder))
    deferred, sample = encoded(folder, WHOLE), encoded(archive, WHOLE)
    assert isinstance(deferred, DeferredCopy)
    assert isinstance(sample, Sample)
    assert (deferred.key, deferred.original, deferred.hash) == (sample.key, sample.original, sample.hash)
    png = (folder / f"{ODD}_segmentation.png").read_bytes()
    assert [sample.members[i] for i in (format.IMAGE, format.MASK, format.ORIGINAL)] == [
        (folder / f"{ODD}.jpg").read_bytes(), png, png,
    ]  # fmt: skip


def test_every_byte_of_image_and_mask_is_the_sources(folder: Path, capsys: pytest.CaptureFixture[str]):
    shard_set = packed(folder)
    assert (
        "40 samples are flagged copied\nof copied samples, only equal bytes count as duplicates"
        in capsys.readouterr().out
    )
    for name in ("train", "val"):
        split = shard_set.split(name)
        assert set(split.table["foreground"]) == {format.UNCOUNTED}
        for index in range(len(split)):
            jpeg, png = folder / f"{split.key(index)}.jpg", folder / f"{split.key(index)}_segmentation.png"
            assert split.read(index, format.IMAGE) == jpeg.read_bytes()
            assert split.read(index, format.MASK) == png.read_bytes()
            assert split.read(index, format.ORIGINAL) == (png.read_bytes() if name == "val" else b"")
            np.testing.assert_array_equal(split.mask(index), np.asarray(Image.open(png)) > 128)
            assert split.meta(index)["flags"] == ["copied"]
    assert verify(shard_set.root, deep=True).faults == []
    print_info(shard_set)
    assert capsys.readouterr().out.count("not counted") == 2


def test_any_number_of_workers_makes_the_same_bytes(folder: Path):
    sets = [packed(folder, workers=workers).root for workers in (1, 3)]
    one, other = ({p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()} for root in sets)
    assert one == other


def test_deferred_copies_from_a_folder_and_staged_ones_from_an_archive_give_the_same_bytes(folder: Path):
    archive = shutil.make_archive(str(folder), "zip", folder)
    from_folder = packed(folder).root
    from_archive = build(archive, archive, folder.parent / "zip", WHOLE, workers=1).location
    for shard in [*from_folder.rglob("*.tar")]:
        assert shard.read_bytes() == (Path(from_archive) / shard.relative_to(from_folder)).read_bytes()


def turned(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(folder / f"{ODD}.jpg").save(folder / f"{ODD}.jpg", exif=exif, quality=95)


def palette(folder: Path) -> None:
    picture = Image.fromarray((disc() > 0).astype(np.uint8)).convert("P")
    picture.putpalette([0, 0, 0, 255, 255, 255])
    picture.save(folder / f"{ODD}_segmentation.png")


def sixteen_bits(folder: Path) -> None:
    Image.fromarray(disc().astype(np.uint16) * 257).save(folder / f"{ODD}_segmentation.png")


def a_png(folder: Path) -> None:
    Image.open(folder / f"{ODD}.jpg").save(folder / f"{ODD}.png")
    (folder / f"{ODD}.jpg").unlink()


def bytes_after_its_end(folder: Path) -> None:
    with (folder / f"{ODD}.jpg").open("ab") as file:
        file.write(b"\0\0")


def test_an_upright_jpeg_that_is_not_plain_is_copied_too(folder: Path):
    exif = Image.Exif()
    exif[0x0112] = 1
    Image.open(folder / f"{ODD}.jpg").save(folder / f"{ODD}.jpg", exif=exif, quality=95)
    assert packed(folder).index.counts.flags == {"copied": 40}


def test_images_that_are_copied_are_duplicates_only_if_all_their_bytes_are_the_same(folder: Path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8))
    noise.save(folder / f"{ODD}.jpg", quality=95)
    Image.new("L", noise.size, 255).save(folder / f"{ODD}_segmentation.png")
    jpeg = (folder / f"{ODD}.jpg").read_bytes()
    for key in ("ISIC_9", "A_8"):
        (folder / f"{key}.jpg").write_bytes(jpeg)
        shutil.copyfile(folder / f"{ODD}_segmentation.png", folder / f"{key}_segmentation.png")
    middle = len(jpeg) // 2
    assert 0xFF not in jpeg[middle - 1 : middle + 1]  # no marker is torn
    (folder / "A_8.jpg").write_bytes(jpeg[:middle] + bytes([jpeg[middle] ^ 1]) + jpeg[middle + 1 :])
    assert packed(folder).index.counts.duplicates == {"bytes": 1}


@pytest.mark.parametrize("change", [turned, palette, sixteen_bits, a_png, bytes_after_its_end])
def test_what_cannot_be_copied_is_decoded(folder: Path, change: Callable[[Path], None]):
    change(folder)
    shard_set = packed(folder)
    assert shard_set.index.counts.flags == {"copied": 39}
    (split, index), *_ = (
        (split, index)
        for split in map(shard_set.split, ("train", "val"))
        for index in range(len(split))
        if split.key(index) == ODD
    )
    mask = split.mask(index)
    assert mask.shape == split.image(index).shape[:2] == ((80, 60) if change is turned else (60, 80))
    assert mask.sum() == split.table["foreground"][index]
    assert verify(shard_set.root, deep=True).faults == []


def torn(folder: Path) -> None:
    path = folder / f"{ODD}.jpg"
    path.write_bytes(path.read_bytes()[:-200])


def flipped(folder: Path) -> None:
    path = folder / f"{ODD}_segmentation.png"
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 9] ^= 1
    path.write_bytes(data)


def another_size(folder: Path) -> None:
    Image.new("L", (9, 9), 255).save(folder / f"{ODD}_segmentation.png")


@pytest.mark.parametrize(
    ("change", "reason"), [(torn, "truncated"), (flipped, "unreadable"), (another_size, "size-mismatch")]
)
def test_what_is_bad_has_the_reason_that_it_has_elsewhere(folder: Path, change: Callable[[Path], None], reason: str):
    change(folder)
    for options in (WHOLE, BuildOptions(size=32)):
        with pytest.raises(BadInputError) as caught:
            packed(folder, options)
        assert {row.reason for row in caught.value.rejected} == {reason, "partner"}


def test_equal_bytes_stay_in_one_split_and_near_ones_are_not_looked_for(folder: Path, tmp_path: Path):
    write_pair(folder, "ISIC_9", seed=900)
    for end in (".jpg", "_segmentation.png"):
        shutil.copyfile(folder / f"ISIC_9{end}", folder / f"ISIC_8{end}")
    Image.open(folder / "ISIC_9.jpg").save(folder / "ISIC_7.jpg", quality=90)
    shutil.copyfile(folder / "ISIC_9_segmentation.png", folder / "ISIC_7_segmentation.png")
    shard_set = packed(folder)
    assert shard_set.index.counts.duplicates == {"bytes": 1}
    keys = [set(shard_set.split(name).table["key"].tolist()) for name in ("train", "val")]
    assert any({b"ISIC_8", b"ISIC_9"} <= part for part in keys)


@pytest.mark.parametrize("value", [1, 128])
def test_a_copied_mask_is_decided_by_its_values(folder: Path, value: int):
    labels = disc() // 255 * np.uint8(value)
    labels[:, :3] = 255  # an ignore rim
    for mask in (disc() // 255 * np.uint8(value), labels):
        Image.fromarray(mask).save(folder / f"{ODD}_segmentation.png")
        with pytest.raises(BadInputError, match=f"first: {ODD}_segmentation.png: mask-values"):
            packed(folder)


def test_a_picture_that_no_jpeg_can_hold_is_rejected(folder: Path):
    (folder / f"{ODD}.jpg").unlink()
    Image.new("RGB", (codecs.MAX_JPEG_SIDE + 1, 2)).save(folder / f"{ODD}.png")
    Image.new("L", (codecs.MAX_JPEG_SIDE + 1, 2), 255).save(folder / f"{ODD}_segmentation.png")
    with pytest.raises(BadInputError, match=f"first: {ODD}.png: pixel-limit, 65501 × 2 pixels"):
        packed(folder)


def test_a_copied_set_without_any_lesion_is_refused(folder: Path):
    for path in folder.glob("*_segmentation.png"):
        Image.fromarray(np.zeros_like(disc())).save(path)
    with pytest.raises(SourceError, match="all 40 masks are empty"):
        packed(folder)


def test_a_mask_of_8_bits_is_lesion_above_128():
    grey, file = np.array([[0, 1, 128, 129, 255]], np.uint8), io.BytesIO()
    Image.fromarray(grey).save(file, "PNG")
    assert codecs.decode_mask(file.getvalue()).tolist() == [[0, 0, 0, 1, 1]]
