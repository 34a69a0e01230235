"""A mask of any mode and depth is read as it is meant, or refused in words: never as something else."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.inputs.decode import BadPairError, load_pair
from shards.inputs.masks import MaskValueError, kind_of_mask, read_mask
from shards.inputs.match import Pair, pair_files
from shards.inputs.source import File, FolderSource, open_sources
from tests.shards.conftest import disc, photograph
from tests.shards.inputs.pictures import png_bytes

LESION = disc() > 0  # (60, 80) bool
RIM = (disc(left=0.42) > 0) & ~LESION


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def values(background: int, lesion: int, rim: int | None = None) -> np.ndarray:
    drawn = np.where(LESION, lesion, background)
    return drawn if rim is None else np.where(RIM, rim, drawn)


def grey(bits: int, background: int, lesion: int, rim: int | None = None) -> Image.Image:
    return opened(png_bytes(values(background, lesion, rim), bits=bits))


def stacked(bits: int, *channels: tuple[int, int]) -> Image.Image:
    """Channels that are (background, lesion) each."""
    return opened(png_bytes(np.stack([values(*pair) for pair in channels], axis=2), bits=bits))


def palette(colours: list[int], alphas: bytes | None = None, indices: np.ndarray = LESION) -> Image.Image:
    picture, file = Image.fromarray(indices.astype(np.uint8)).convert("P"), io.BytesIO()
    picture.putpalette(colours)
    picture.save(file, "PNG", **({} if alphas is None else {"transparency": alphas}))
    return opened(file.getvalue())


def saved(picture: Image.Image, kind: str) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, kind)
    return opened(file.getvalue())


BLACK, WHITE = (0, 0), (255, 255)
MARKED: dict[str, Callable[[], Image.Image]] = {
    "1 bit": lambda: saved(Image.fromarray(LESION), "PNG"),
    "1 bit, inverted by a palette": lambda: palette([255, 255, 255, 0, 0, 0], indices=~LESION),
    "8 bits": lambda: grey(8, 0, 255),
    "8 bits, 0 and 200": lambda: grey(8, 0, 200),
    "8 bits, 40 and 255": lambda: grey(8, 40, 255),
    "16 bits, 0 and 255": lambda: grey(16, 0, 255),
    "16 bits, 0 and 1023": lambda: grey(16, 0, 1023),
    "16 bits, 0 and 4095": lambda: grey(16, 0, 4095),
    "16 bits, 0 and 65535": lambda: grey(16, 0, 65535),
    "16 bits, 0 and 65280": lambda: grey(16, 0, 65280),
    "16 bits in colour, 0 and 255": lambda: stacked(16, (0, 255), (0, 255), (0, 255)),
    "16 bits in colour, opaque": lambda: stacked(16, (0, 255), (0, 255), (0, 255), (65535, 65535)),
    "16 bits grey and alpha": lambda: stacked(16, (0, 255), (65535, 65535)),
    "16 bits, alpha alone": lambda: stacked(16, (0, 0), (0, 65535)),
    "16 bits, alpha alone, 0 and 255": lambda: stacked(16, (65535, 65535), (0, 255)),
    "red": lambda: stacked(8, (0, 255), BLACK, BLACK),
    "RGBA, transparent background": lambda: stacked(8, *[(0, 255)] * 3, (0, 255)),
    "RGBA, red, half transparent": lambda: stacked(8, (0, 255), BLACK, BLACK, (0, 120)),
    "RGBA, all transparent": lambda: stacked(8, *[(0, 255)] * 3, BLACK),
    "RGBA, white, alpha alone": lambda: stacked(8, *[WHITE] * 3, (0, 255)),
    "RGBA, black, alpha alone": lambda: stacked(8, *[BLACK] * 3, (0, 255)),
    "LA": lambda: stacked(8, (0, 255), WHITE),
    "LA, alpha alone": lambda: stacked(8, WHITE, (0, 255)),
    "palette": lambda: palette([0, 0, 0, 255, 255, 255]),
    "palette, high indices": lambda: palette([0] * 3 * 254 + [255] * 3 + [0] * 3, indices=np.where(LESION, 254, 255)),
    "palette, alpha alone": lambda: palette([255] * 6, b"\0\xff"),
    "JPEG": lambda: saved(Image.fromarray(disc()), "JPEG"),
    "BMP of 1 bit": lambda: saved(Image.fromarray(LESION), "BMP"),
    "BMP in colour": lambda: saved(Image.fromarray(disc()).convert("RGB"), "BMP"),
}


@pytest.mark.parametrize("kind", MARKED)
def test_what_a_mask_marks_is_the_lesion(kind: str):
    mask, flags = read_mask(MARKED[kind]())
    assert set(np.unique(mask)) == {0, 255}
    wrong = np.count_nonzero((mask > 0) != LESION)
    assert wrong <= (20 if kind == "JPEG" else 0)
    assert flags == (["grey-mask"] if kind == "JPEG" else [])


AMBIGUOUS: dict[str, tuple[Callable[[], Image.Image], str]] = {
    "8 bits, 0 and 1": (lambda: grey(8, 0, 1), "its values are 0 to 1, none above 128"),
    "8 bits, 0 and 128": (lambda: grey(8, 0, 128), "its values are 0 to 128, none above 128"),
    "16 bits, 0 and 1": (lambda: grey(16, 0, 1), "its values are 0 to 1, none above 128"),
    "16 bits, 0 and 300": (lambda: grey(16, 0, 300), r"0 to 300, none above 128 \(when 300 is taken as 75 of 255\)"),
    "16 bits in colour, 0 and 1": (lambda: stacked(16, (0, 1), BLACK, BLACK), "its values are 0 to 1"),
    "palette of dark colours": (lambda: palette([0, 0, 0, 128, 0, 0]), "its values are 0 to 128"),
    "alpha of 0 and 1": (lambda: stacked(8, WHITE, (0, 1)), "its values are 0 to 1"),
    "two bright values": (lambda: grey(8, 200, 255), "its values are 200 to 255, all above 128"),
    "the two brightest values": (lambda: grey(8, 254, 255), "its values are 254 to 255, all above 128"),
    "labels and a rim to ignore": (lambda: grey(8, 0, 1, 255), "a label map: its values are 0, 1, 255"),
    "a rim to ignore on more labels": (
        lambda: opened(png_bytes(np.where(LESION, np.arange(80) % 5, values(0, 0, 255)), bits=8)),
        "a label map: its values are 0, 1, 2, 3, 4, 255",
    ),
    "16 bits, labels and a rim": (lambda: grey(16, 0, 1, 65535), "a label map: its values are 0, 1, 65535"),
    "16 bits, 0, 255 and 65535": (lambda: grey(16, 0, 255, 65535), "a label map"),
    "a rim that is larger than the lesion": (lambda: grey(8, 0, 255, 1), "a label map: its values are 0, 1, 255"),
    "labels of half the range": (lambda: grey(8, 0, 100, 200), "a label map"),
    "a palette of labels": (
        lambda: palette([0, 0, 0, 128, 0, 0, 224, 224, 192], indices=values(0, 1, 2)), "a label map",
    ),
    "red on blue": (lambda: stacked(8, (0, 255), BLACK, (255, 0)), "2 bright colours"),
    "red on white": (lambda: stacked(8, WHITE, (255, 0), (255, 0)), "2 bright colours"),
    "a palette of bright labels": (
        lambda: palette([0, 0, 0, 255, 0, 0, 0, 255, 0], indices=values(0, 1, 2)), "2 bright colours",
    ),
    "white, cut out": (lambda: stacked(8, *[(0, 255)] * 3, (255, 0)), "marks pixels that are fully transparent"),
}  # fmt: skip


@pytest.mark.parametrize("kind", AMBIGUOUS)
def test_a_mask_that_can_be_read_in_two_ways_is_refused(kind: str):
    picture, words = AMBIGUOUS[kind]
    with pytest.raises(MaskValueError, match=words):
        read_mask(picture())


@pytest.mark.parametrize("value", [0, 255])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_mask_without_a_difference_is_all_lesion_or_none(bits: int, channels: int, value: int):
    mask, flags = read_mask(opened(png_bytes(np.full((6, 7, channels), value), bits=bits)))
    assert (mask == value).all()
    assert flags == ["constant-mask"]


def test_a_soft_edge_is_cut_at_the_threshold_of_the_official_scorer():
    soft = np.asarray(Image.fromarray(disc(480, 640)).resize((80, 60), Image.Resampling.BICUBIC))
    for picture in (Image.fromarray(soft), opened(png_bytes(soft.astype(np.uint16) * 257))):
        mask, flags = read_mask(picture)
        np.testing.assert_array_equal(mask > 0, soft > 128)
        assert flags == ["grey-mask"]


def test_a_pair_is_rejected_for_the_mask_that_is_ambiguous(tmp_path: Path):
    Image.fromarray(photograph(1)).save(tmp_path / "A.png")
    (tmp_path / "A_segmentation.png").write_bytes(png_bytes(values(0, 1)))
    files = [File(0, name, 1) for name in ("A.png", "A_segmentation.png")]
    with pytest.raises(BadPairError, match=r"its values are 0 to 1, none above 128; lesion must be 255") as caught:
        load_pair(Pair("A", *files, group="A"), [FolderSource(str(tmp_path))], "stretch", None)
    assert (caught.value.file.name, caught.value.reason) == ("A_segmentation.png", "mask-values")


@pytest.mark.parametrize(
    ("left", "expected"), [((0, 0), "empty"), ((0, 80), "full"), ((20, 50), ""), ((2, 78), "inverted")]
)
def test_a_mask_is_classified_by_its_area_and_its_border(left: tuple[int, int], expected: str):
    mask = np.zeros((60, 80), np.uint8)
    mask[:, slice(*left)] = 1
    assert kind_of_mask(mask) == expected
    assert kind_of_mask(mask * 255) == expected


@pytest.mark.real
def test_real_masks_are_read_without_a_flag(real_data: Path):
    sources, files = open_sources([str(real_data / "isic-original")])
    for pair in pair_files(files).pairs:
        picture = opened(sources[0].read(pair.mask.name))
        mask, flags = read_mask(picture)
        assert flags == []
        np.testing.assert_array_equal(mask, np.asarray(picture))
        assert kind_of_mask(mask) in ("", "inverted")


@pytest.mark.parametrize("turns", range(4))
def test_each_side_of_the_border_tells_an_inverted_mask(turns):
    mask = np.zeros((100, 100), np.uint8)
    mask[0], mask[:, -1], mask[-1, 80:] = 1, 1, 1  # 219 of 396 pixels
    assert kind_of_mask(np.rot90(mask, turns)) == "inverted"
    mask[:, -1] = 0
    assert kind_of_mask(np.rot90(mask, turns)) == ""
