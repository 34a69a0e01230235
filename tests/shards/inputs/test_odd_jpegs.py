"""Build, deep check, training reader and prediction agree on which JPEGs are whole, and on their pixels."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.build import build
from shards.inputs.decode import BadPairError, load_image
from shards.inputs.match import BadInputError
from shards.inputs.source import File, FolderSource, Source
from shards.planning.plan import BuildOptions
from shards.reader import ShardSet
from shards.verify import verify
from tests.shards.conftest import disc, photograph
from tests.shards.inputs.pictures import damaged_jpegs, jpeg_bytes, odd_jpegs, png_bytes

NOISE = np.random.default_rng(0).normal(0, 8, (120, 171, 3))
PICTURE = np.clip(photograph(1, 120, 171) + NOISE, 0, 255).astype(np.uint8)
LEVELS = [np.random.default_rng(n).integers(-60, 60, (15, 22)) // (1, 4, 4)[n] for n in range(3)]


def saved(mode: str = "RGB", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PICTURE).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 3
    return saved(exif=exif)


def write_folder(folder: Path, files: dict[str, bytes], mask: np.ndarray | None = None) -> dict[str, str]:
    """Write a pair for each file; the name of each by its key."""
    folder.mkdir()
    names = dict(zip((f"K{n}" for n in range(len(files))), files, strict=True))
    for key, name in names.items():
        suffix = ".png" if files[name][:4] == b"\x89PNG" else ".jpg"
        (folder / f"{key}{suffix}").write_bytes(files[name])
        Image.fromarray(disc(120, 171) if mask is None else mask).save(folder / f"{key}_segmentation.png")
    return names


@pytest.mark.parametrize(("size", "fit"), [(None, "stretch"), (32, "stretch"), (160, "pad"), (64, "crop")])
def test_whatever_can_be_read_is_built_and_the_set_reads_back(tmp_path: Path, size: int | None, fit):
    files = {
        **odd_jpegs(PICTURE),
        "3 x 1": jpeg_bytes(LEVELS, [(3, 1), (1, 1), (1, 1)], (120, 171)),
        "4 x 2": jpeg_bytes(LEVELS, [(4, 2), (1, 1), (1, 1)], (120, 171)),
        "1 x 4": jpeg_bytes(LEVELS, [(1, 4), (1, 1), (1, 1)], (120, 171)),
        "finer colour": jpeg_bytes(LEVELS, [(1, 1), (2, 2), (1, 1)], (120, 171)),
        "progressive": saved(progressive=True),
        "CMYK": saved("CMYK"),
        "grey": saved("L"),
        "16 bits": png_bytes(PICTURE.astype(np.uint16) * 257),
        "turned": turned(),
    }
    names = write_folder(tmp_path / "in", files, np.full((120, 171), 255, np.uint8))
    options = BuildOptions(size=size or "original", fit=fit, split="train=0.5,val=0.5", on_bad_input="skip")
    build(str(tmp_path / "in"), str(tmp_path / "in"), tmp_path / "set", options, workers=1)
    assert verify(tmp_path / "set", deep=True).faults == []
    source: list[Source] = [FolderSource(str(tmp_path / "in"))]
    seen: set[str] = set()
    shard_set = ShardSet.open(tmp_path / "set")
    for split in map(shard_set.split, shard_set.index.splits):
        for index in range(len(split)):
            name = split.meta(index)["image"]
            expected, plan = load_image(File(0, name, 1), source, fit, size)
            image = split.image(index)
            assert image.shape == plan.resize_image(expected).shape
            difference = np.abs(image.astype(int) - plan.resize_image(expected))
            exact = split.read(index, 0) == files[names[split.key(index)]]
            assert difference.max() == 0 if exact else difference.mean() < 12, names[split.key(index)]
            seen.add(split.key(index))
    left_out = {names[key] for key in names.keys() - seen}
    assert left_out == {"turned"}  # its mask fits it both ways


@pytest.mark.parametrize("size", [None, 32])
def test_damaged_files_are_rejected_as_images_and_as_masks(tmp_path: Path, size: int | None):
    names = write_folder(tmp_path / "in", damaged_jpegs(PICTURE))
    with pytest.raises(BadInputError) as caught:
        build(
            str(tmp_path / "in"),
            str(tmp_path / "in"),
            tmp_path / "set",
            BuildOptions(size=size or "original", split="train=1"),
            workers=1,
        )
    assert {row.path for row in caught.value.rejected if row.reason in ("truncated", "unreadable")} == {
        f"{key}.jpg" for key in names
    }


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_prediction_refuses_the_damage_that_a_build_refuses(tmp_path: Path, mode: str):
    jpeg = saved(mode, quality=95)
    middle = len(jpeg) // 2
    for name, data in {**damaged_jpegs(PICTURE), "cut and ended": jpeg[:middle] + jpeg[-2:]}.items():
        (tmp_path / "A.jpg").write_bytes(data)
        with pytest.raises(BadPairError) as caught:
            load_image(File(0, "A.jpg", len(data)), [FolderSource(str(tmp_path))], "stretch", 32)
        assert caught.value.reason in ("truncated", "unreadable"), name


def test_a_copy_with_damage_behind_odd_headers_is_rejected(tmp_path: Path):
    exif = Image.Exif()
    exif[0x010F] = "camera"
    jpeg = saved(exif=exif, quality=95)
    middle = len(jpeg) // 2
    write_folder(tmp_path / "in", {"exif": jpeg[:middle] + jpeg[-2:], "whole": jpeg})
    with pytest.raises(BadInputError, match=r"first: K0\.jpg: truncated"):
        build(
            str(tmp_path / "in"), str(tmp_path / "in"), tmp_path / "set", BuildOptions(size="original", split="train=1")
        )
