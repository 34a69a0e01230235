"""Contact sheets: tiles, outlines and the size of the sheet."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from shards import format
from shards.build import build
from shards.errors import ShardSetError
from shards.planning.plan import BuildOptions
from shards.preview import contact_sheet, tile


@pytest.fixture(scope="module")
def built(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("preview") / "set"
    build(str(pictures), str(pictures), out, BuildOptions(size=32), workers=1)
    return out


def test_a_tile_shows_the_picture_and_the_outline_of_its_mask():
    image, mask = np.full((64, 64, 3), 50, np.uint8), np.zeros((64, 64), np.uint8)
    mask[16:48, 16:48] = 1
    pixels = np.asarray(tile(image, mask))
    marked = (pixels == (0, 255, 120)).all(axis=2)
    assert marked[48:50, 60:130].all()  # the mask begins at a quarter of the tile's 192 pixels
    assert (pixels[~marked] == 50).all()


def test_a_sheet_is_as_large_as_its_pictures_need(built: Path):
    sheet = contact_sheet(built, samples=9)
    assert sheet.size == (8 + 6 * 200, 8 + 2 * 234)
    assert contact_sheet(built, samples=10_000).height == 8 + -(-40 // 6) * 234


def test_a_set_without_samples_is_one_line(built: Path, tmp_path: Path):
    index = json.loads((built / format.INDEX_NAME).read_bytes())
    index["splits"] = {}
    index["digest"] = format.digest_of(index)
    (tmp_path / format.INDEX_NAME).write_bytes(format.canonical_json(index))
    with pytest.raises(ShardSetError, match=r"no sample is in it; see rejected\.csv"):
        contact_sheet(tmp_path)
