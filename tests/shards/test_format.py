"""The format: an index that is damaged, edited or of another version is refused."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shards import codecs, format
from shards.build import build
from shards.errors import CorruptShardError, ShardSetError
from shards.format import Index
from shards.planning.plan import BuildOptions
from tests.shards.conftest import disc, photograph


@pytest.fixture(scope="module")
def index(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("format") / "set"
    build(str(pictures), str(pictures), out, BuildOptions(size=32), workers=1)
    return (out / format.INDEX_NAME).read_bytes()


def changed(index: bytes, path: str, value: Any) -> bytes:
    """An index with one field set, or taken away by ..., and the digest that then belongs to it."""
    whole = json.loads(index)
    *above, last = path.split(".")
    field = whole
    for name in above:
        field = field[int(name) if isinstance(field, list) else name]
    if value is ...:
        del field[last]
    else:
        field[last] = value
    whole["digest"] = format.digest_of(whole)
    return format.canonical_json(whole)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("splits", []),
        ("splits", {"../up": {"samples": 0, "table": {"name": "samples-../up.npy", "bytes": 0}, "shards": []}}),
        ("splits.train.table.name", "/etc/hostname"),
        ("splits.train.table.sha256", None),
        ("splits.train.shards.0.name", "../other/000000.tar"),
        ("splits.train.shards.0.bytes", -1),
        ("splits.train.shards.0.samples", "7"),
        ("splits.train.shards.0.samples", True),
        (
            "splits",
            {"a-b": {"samples": 0, "table": {"name": "samples-a-b.npy", "bytes": 0, "sha256": ""}, "shards": []}},
        ),
        ("splits.train.shards", ...),
        ("counts", None),
        ("counts.packed", ...),
        ("size", "32"),
        ("size", 0),
    ],
)
def test_an_index_with_a_wrong_field_is_refused(index: bytes, path: str, value: Any):
    with pytest.raises(ShardSetError, match="here: its fields are not those of isicdist-shards version 1"):
        Index.parse(changed(index, path, value), "here")


@pytest.mark.parametrize(
    ("path", "value"),
    [("later", {"x": 1}), ("counts.later", 3), ("counts.duplicates", ...), ("built", ...), ("size", None)],
)
def test_a_field_more_or_one_that_only_informs_less_is_no_other_version(index: bytes, path: str, value: Any):
    assert Index.parse(changed(index, path, value), "here").counts.packed == 80


@pytest.mark.parametrize(("path", "value"), [("version", 2), ("format", "webdataset")])
def test_another_version_is_refused_with_both_named(index: bytes, path: str, value: Any):
    with pytest.raises(ShardSetError, match=f"{value}.*this isicdist reads isicdist-shards version 1"):
        Index.parse(changed(index, path, value), "here")


def test_an_index_that_was_edited_or_cut_is_refused(index: bytes):
    with pytest.raises(CorruptShardError, match="does not have its digest"):
        Index.parse(index.replace(b'"seed":0', b'"seed":1'), "here")
    packed = re.sub(rb'"packed":\d+', b'"packed":2', index)
    with pytest.raises(CorruptShardError, match="does not have its digest"):
        Index.parse(packed, "here")
    for text in (b"", b"[1]", index[:-20], b"[" * 100_000):
        with pytest.raises(ShardSetError, match="not the index of a shard set"):
            Index.parse(text, "here")


def test_a_written_index_is_read_back_as_it_was(index: bytes):
    parsed = Index.parse(index, "here")
    assert format.canonical_json(parsed.to_json()) == index
    new = Index.new(size=parsed.size, built=parsed.built, counts=parsed.counts, splits=parsed.splits)
    assert new == parsed


def test_image_and_mask_come_back():
    picture, mask = photograph(1), disc()
    back = codecs.decode_image(codecs.encode_image(picture)).astype(int)
    assert np.abs(back - picture).mean() < 2
    np.testing.assert_array_equal(codecs.decode_mask(codecs.encode_mask(mask)), mask > 0)


def test_more_pixels_than_the_limit_are_not_decoded(monkeypatch: pytest.MonkeyPatch):
    jpeg, png = codecs.encode_image(photograph(1)), codecs.encode_mask(disc())
    bomb = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(bomb, "PNG")
    with pytest.raises(ValueError, match="20000 × 10000 pixels, more than 100000000"):
        codecs.decode_mask(bomb.getvalue())
    monkeypatch.setattr(codecs, "MAX_PIXELS", 60 * 80 - 1)
    for decode, data in ((codecs.decode_image, jpeg), (codecs.decode_mask, png)):
        with pytest.raises(ValueError, match="80 × 60 pixels, more than 4799"):
            decode(data)


def test_what_is_no_picture_is_a_plain_error():
    for data in (b"", b"no picture", codecs.encode_image(photograph(1))[:100]):
        with pytest.raises((ValueError, OSError)):
            codecs.decode_image(data)
        with pytest.raises((ValueError, OSError)):
            codecs.decode_mask(data)


def test_a_name_that_is_no_utf_8_survives_json():
    name = b"bad\xff.jpg".decode(errors="surrogateescape")
    assert json.loads(format.canonical_json([name, "ä"])) == [name, "ä"]


def test_a_table_names_no_shard_beyond_the_last():
    table = np.zeros(2, format.sample_dtype(1))
    table["key"], table["shard"] = [b"a", b"b"], [0, 1]
    data = io.BytesIO()
    np.save(data, table)
    assert len(format.parse_table(data.getvalue(), 2)) == 2
    with pytest.raises(ValueError, match="shard 1 of 1"):
        format.parse_table(data.getvalue(), 1)


def test_a_key_ends_with_its_last_letter():
    assert format.KEY_PATTERN.match("ISIC_1")
    for key in ("", "ISIC_1\n", "ISIC.1", "a" * 81):
        assert not format.KEY_PATTERN.match(key)
