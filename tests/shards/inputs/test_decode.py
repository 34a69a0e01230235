"""Decoding: every mode of image and mask, EXIF orientation, damaged files, and pairs that are copied."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from shards import codecs
from shards.errors import ToolkitError
from shards.inputs.decode import MIN_SCALED_PSNR, TRANSPOSE_OF, BadPairError, Decoded, load_image, load_pair
from shards.inputs.match import Pair, pair_files
from shards.inputs.source import File, FolderSource, open_sources
from tests.shards.conftest import disc, photograph

PICTURE, MASK = photograph(1), disc()


def loaded(folder: Path, image: str = "A.png", mask: str = "A_segmentation.png", side: int | None = None) -> Decoded:
    files = [File(0, name, (folder / name).stat().st_size) for name in (image, mask)]
    return load_pair(Pair("A", *files, group="A"), [FolderSource(str(folder))], "stretch", side)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.fromarray(PICTURE).save(tmp_path / "A.png")
    Image.fromarray(MASK).save(tmp_path / "A_segmentation.png")
    return tmp_path


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "16-bit", "CMYK"])
def test_an_image_of_any_mode_becomes_the_rgb_it_shows(folder: Path, mode: str):
    picture, name = Image.fromarray(PICTURE), "A.png"
    if mode == "16-bit":
        grey = np.asarray(picture.convert("L"))
        Image.fromarray(grey.astype(np.uint16) * 257).save(folder / name)
        expected = np.repeat(grey[..., None], 3, axis=2)
    elif mode == "CMYK":
        name = "A.jpg"
        picture.convert("CMYK").save(folder / name, quality=100, subsampling=0)
        expected = PICTURE
    else:
        changed = picture.convert(mode)
        changed.save(folder / name)
        expected = np.asarray(changed.convert("RGB"))
    result = np.asarray(loaded(folder, name).picture)
    assert result.shape == PICTURE.shape
    assert np.abs(result.astype(int) - expected).max() <= (12 if mode == "CMYK" else 0)


@pytest.mark.parametrize("kind", ["L", "1", "P", "coloured palette", "RGB", "RGBA", "16-bit", "bmp"])
def test_a_mask_of_any_mode_becomes_the_same_zeros_and_ones(folder: Path, kind: str):
    picture, name = Image.fromarray(MASK), "A_segmentation.png"
    if kind == "16-bit":
        picture = Image.fromarray(MASK.astype(np.uint16) * 257)
    elif kind == "coloured palette":
        picture = Image.fromarray((MASK > 0).astype(np.uint8)).convert("P")
        picture.putpalette([0, 0, 0, 255, 0, 0])
    elif kind == "bmp":
        name = "A_segmentation.bmp"
    else:
        picture = picture.convert(kind)
    picture.save(folder / name)
    decoded = loaded(folder, mask=name)
    np.testing.assert_array_equal(decoded.mask, MASK)
    assert decoded.flags == []


@pytest.mark.parametrize(("progressive", "subsampling"), [(True, 2), (False, 2), (False, 0)])
def test_every_kind_of_jpeg_is_read(folder: Path, progressive: bool, subsampling: int):
    Image.fromarray(PICTURE).save(folder / "A.jpg", quality=98, progressive=progressive, subsampling=subsampling)
    result = np.asarray(loaded(folder, "A.jpg").picture).astype(int)
    assert np.abs(result - PICTURE).mean() < 2


@pytest.mark.parametrize("orientation", sorted(TRANSPOSE_OF))
@pytest.mark.parametrize("drawn_on", ["upright", "stored"])
def test_image_and_mask_end_the_same_way_round(folder: Path, orientation: int, drawn_on: str):
    turn = TRANSPOSE_OF[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.repeat(MASK[..., None], 3, axis=2))  # an image that shows its own mask
    stored.save(folder / "A.jpg", quality=98, exif=exif)
    upright = Image.fromarray(MASK).transpose(turn)
    (upright if drawn_on == "upright" else Image.fromarray(MASK)).save(folder / "A_segmentation.png")
    if orientation < 5:  # the sizes do not say on which of the two the mask was drawn
        with pytest.raises(BadPairError) as caught:
            loaded(folder, "A.jpg")
        assert caught.value.reason == "orientation"
        return
    decoded = loaded(folder, "A.jpg")
    assert decoded.resize_plan.original == (80, 60)
    np.testing.assert_array_equal(decoded.mask, np.asarray(upright))
    assert ((np.asarray(decoded.picture)[..., 0] > 128) == (decoded.mask > 128)).mean() > 0.99
    assert decoded.jpeg is None  # its bytes lie on their side


@pytest.mark.parametrize("orientation", sorted(TRANSPOSE_OF))
def test_an_image_without_a_mask_is_turned_upright_as_pillow_does(folder: Path, orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(PICTURE).save(folder / "A.png", exif=exif)
    image, plan = load_image(File(0, "A.png", 1), [FolderSource(str(folder))], "stretch", 32)
    with Image.open(folder / "A.png") as stored:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(ImageOps.exif_transpose(stored)))
    assert plan.original == (image.height, image.width)


def test_a_damaged_exif_tag_beside_the_orientation_does_not_matter(folder: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x0132] = "no date"
    block = exif.tobytes().replace(struct.pack(">HHI", 0x0132, 2, 8), struct.pack(">HHI", 0x0128, 2, 8))
    stored = Image.fromarray(PICTURE)
    stored.save(folder / "A.png", exif=block)
    image, _ = load_image(File(0, "A.png", 1), [FolderSource(str(folder))], "stretch", 32)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(stored.transpose(TRANSPOSE_OF[6])))


def damaged(folder: Path, reason: str) -> tuple[str, str]:
    """Make a pair that is bad in one way; the names of its image and mask."""
    image, mask = "A.jpg", "A_segmentation.png"
    buffer = io.BytesIO()
    Image.fromarray(PICTURE).save(buffer, "JPEG")
    data = buffer.getvalue()
    if reason == "truncated":
        data = data[:-100]
    elif reason == "unreadable":
        data = b"GIF89a" + data
    elif reason == "pixel-limit":
        Image.new("1", (20_000, 10_000)).save(folder / "A.png")
        return "A.png", mask
    elif reason == "size-mismatch":
        Image.fromarray(MASK[:-1]).save(folder / mask)
    elif reason == "mask-values":
        Image.fromarray(MASK // 255).save(folder / mask)
    (folder / image).write_bytes(data)
    return image, mask


@pytest.mark.parametrize("reason", ["truncated", "unreadable", "pixel-limit", "size-mismatch", "mask-values"])
def test_a_bad_pair_is_rejected_with_its_reason_and_its_partner(folder: Path, reason: str):
    names = damaged(folder, reason)
    with pytest.raises(BadPairError) as caught:
        loaded(folder, *names)
    assert caught.value.reason == reason
    image, mask = (File(0, name, 1) for name in names)
    error = BadPairError(mask if reason.startswith(("size", "mask")) else image, reason, "")
    assert caught.value.file.name == error.file.name
    rows = {row.path: row.reason for row in error.rejected(Pair("A", image, mask, group="A"))}
    assert rows == {error.file.name: reason, (image if error.file is mask else mask).name: "partner"}


@pytest.mark.parametrize("cut", [0, 1, 30, 150, -1])
@pytest.mark.parametrize("name", ["A.png", "A_segmentation.png"])
def test_a_png_cut_anywhere_is_never_taken_as_whole(folder: Path, name: str, cut: int):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: cut if cut >= 0 else len(data) // 2])
    with pytest.raises(BadPairError) as caught:
        loaded(folder)
    assert caught.value.file.name == name
    assert caught.value.reason in ("truncated", "unreadable")


def test_a_file_that_is_gone_is_no_bad_input(folder: Path):
    files = [File(0, name, 1) for name in ("A.png", "A_segmentation.png")]
    (folder / "A_segmentation.png").unlink()
    with pytest.raises(ToolkitError, match=r"A_segmentation\.png was there and is gone"):
        load_pair(Pair("A", *files, group="A"), [FolderSource(str(folder))], "stretch", None)


def test_odd_masks_are_flagged_and_kept(folder: Path):
    Image.fromarray(np.zeros_like(MASK)).save(folder / "A_segmentation.png")
    assert loaded(folder).flags == ["constant-mask"]
    grey = MASK.copy()
    grey[0, :2] = 100, 129
    Image.fromarray(grey).save(folder / "A_segmentation.png")
    decoded = loaded(folder)
    assert decoded.flags == ["grey-mask"]
    assert decoded.mask[0, :2].tolist() == [0, 255]


def psnr(image: np.ndarray, expected: np.ndarray) -> float:
    """In dB; of images (H, W, 3) uint8."""
    return float(10 * np.log10(255**2 / ((image.astype(float) - expected) ** 2).mean().clip(1e-9)))


def test_a_scaled_decode_is_within_the_stated_distance_of_the_full_one(folder: Path):
    big = photograph(3, 1497, 2003)
    big = np.clip(big + np.random.default_rng(0).normal(0, 8, big.shape), 0, 255).astype(np.uint8)
    Image.fromarray(big).save(folder / "A.jpg", quality=92)
    Image.fromarray(disc(1497, 2003)).save(folder / "A_segmentation.png")
    decoded = loaded(folder, "A.jpg", side=256)
    assert decoded.picture.size == (501, 375)  # a quarter, rounded up
    with Image.open(folder / "A.jpg") as full:
        expected = decoded.resize_plan.resize_image(full.convert("RGB"))
    assert psnr(decoded.resize_plan.resize_image(decoded.picture), expected) > MIN_SCALED_PSNR


@pytest.mark.real
@pytest.mark.parametrize("side", [128, 512])
def test_scaled_real_photographs_are_within_the_stated_distance(real_data: Path, side: int):
    sources, files = open_sources([str(real_data / "isic-original")])
    found = []
    for pair in pair_files(files).pairs[:20]:
        decoded = load_pair(pair, sources, "stretch", side)
        full, fit = load_image(pair.image, sources, "stretch", side)
        if decoded.picture.size != full.size:
            found.append(psnr(decoded.resize_plan.resize_image(decoded.picture), fit.resize_image(full)))
    assert len(found) > 3
    assert min(found) > MIN_SCALED_PSNR + 1


def test_an_upright_jpeg_can_be_copied_as_it_is(folder: Path):
    Image.fromarray(PICTURE).save(folder / "A.jpg")
    assert loaded(folder, "A.jpg").jpeg == (folder / "A.jpg").read_bytes()
    assert codecs.decode_image((folder / "A.jpg").read_bytes()).shape == PICTURE.shape


def test_a_mask_is_turned_by_a_tag_of_its_own(folder: Path):
    """The size of a square tells nothing: a mask that is not turned would fit."""
    Image.fromarray(PICTURE[:60, :60]).save(folder / "A.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.triu(np.full((60, 60), 255, np.uint8))).save(folder / "A_segmentation.png", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(folder / "A_segmentation.png")))
    assert (expected != np.triu(expected)).any()
    np.testing.assert_array_equal(loaded(folder).mask, expected)
