"""Preview page: the samples of the contact sheet, with their splits and flags, in one file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shards.build import build
from shards.errors import UsageError
from shards.format import COPIED
from shards.planning.plan import BuildOptions
from shards.preview import choose_samples
from shards.preview_page import preview_page
from shards.reader import ShardSet


def test_the_page_shows_the_samples_of_the_contact_sheet(shard_set: Path):
    page = preview_page(shard_set, samples=9)
    chosen = [(split.name, split.key(index)) for split, index in choose_samples(ShardSet.open(shard_set), 9)]
    tiles = re.findall(r'<figure class="tile" data-split="(\w+)" data-flags="(.*?)">', page)
    assert [split for split, _ in tiles] == [split for split, _ in chosen]
    assert {split for split, _ in tiles} == {"train", "val", "test"}
    assert re.findall(r'alt="(\S+): photograph"', page) == [key for _, key in chosen]
    assert page.count('src="data:image/jpeg;base64,') == page.count('src="data:image/png;base64,') == 9
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_every_flag_can_be_chosen(tmp_path: Path, archive: tuple[Path, Path]):
    build(str(archive[0]), str(archive[1]), tmp_path / "set", BuildOptions(size="original"), workers=1)
    page = preview_page(tmp_path / "set", samples=3)
    assert re.findall('name="flag" value="(.+?)"', page) == [COPIED]
    assert page.count(f'data-flags="{COPIED}"') == 3
    for split, index in choose_samples(ShardSet.open(tmp_path / "set"), 3):
        meta = split.meta(index)
        assert f"{split.name} · {meta['width']} × {meta['height']} · lesion" in page


def test_a_page_of_no_sample_is_refused(shard_set: Path):
    with pytest.raises(UsageError, match="--samples 0"):
        preview_page(shard_set, samples=0)
