"""Verification, also of faults that no checksum shows: replaced members with the checksums of table and index."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards import format, layout
from shards.build import build
from shards.errors import CorruptShardError
from shards.planning.plan import BuildOptions
from shards.reader import ShardSet
from shards.verify import verify
from tests.shards.test_cli import run

SAMPLE = 2


@pytest.fixture(scope="module")
def built(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("verify") / "set"
    build(str(pictures), str(pictures), out, BuildOptions(size=32), workers=1)
    return out


@pytest.fixture
def own(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "set"))


def replace_member(root: Path, member: int, data: bytes, **columns: int) -> str:
    """Replace the first bytes of a member of a sample of val and update all checksums; gives the sample's key."""
    split = ShardSet.open(root).split("val")
    table, path = split.table.copy(), root / split.shards[0]
    start, size = layout.member_spans(int(table["offset"][SAMPLE]), table["size"][SAMPLE].tolist())[member]
    tar = bytearray(path.read_bytes())
    assert len(data) <= size
    tar[start : start + len(data)] = data
    path.write_bytes(tar)
    table["crc"][SAMPLE, member] = zlib.crc32(tar[start : start + size])
    for name, value in columns.items():
        table[name][SAMPLE] = value
    np.save(root / format.table_name("val"), table)
    index = json.loads((root / format.INDEX_NAME).read_bytes())
    entry = index["splits"]["val"]
    entry["shards"][0]["sha256"] = hashlib.sha256(tar).hexdigest()
    entry["table"]["sha256"] = hashlib.sha256((root / format.table_name("val")).read_bytes()).hexdigest()
    index["digest"] = format.digest_of(index)
    (root / format.INDEX_NAME).write_bytes(format.canonical_json(index))
    return split.key(SAMPLE)


def test_a_good_set_has_no_fault(built: Path):
    found = verify(built, deep=True)
    assert found.faults == []
    assert (found.shards, found.samples) == (3, 40)
    assert found.bytes == sum(path.stat().st_size for path in built.glob("*/*.tar"))


@pytest.mark.parametrize("member", [format.IMAGE, format.MASK, format.ORIGINAL])
def test_deep_names_shard_and_key_of_what_does_not_decode(own: Path, member: int, capsys: pytest.CaptureFixture[str]):
    key = replace_member(own, member, b"no picture")
    assert run("verify", own) == 0
    assert run("verify", own, "--deep") == 1
    assert f"val/000000.tar: {key}.{format.MEMBERS[member]} does not decode" in capsys.readouterr().err


def test_a_mask_that_is_no_picture_inside_is_named(own: Path):
    """Pillow raises a SyntaxError for a broken chunk."""
    png = io.BytesIO()
    Image.new("L", (8, 8)).save(png, "PNG")
    key = replace_member(own, format.MASK, png.getvalue().replace(b"IHDR", b"IHDX"))
    with pytest.raises(CorruptShardError, match=rf"val/000000\.tar: {key}\.mask\.png does not decode"):
        ShardSet.open(own).split("val").mask(SAMPLE)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"[1]   ", "is not a sample's JSON"),
        (b"{}    ", "is not a sample's JSON (KeyError('key'))"),
        (b"\xff\xff", "is not a sample's JSON"),
        (b'{"flags":[],"fit":0,"key":"other","height":60,"width":80', "its JSON is another sample's"),
    ],
)
def test_deep_reads_every_samples_json(own: Path, text: bytes, words: str):
    split = ShardSet.open(own).split("val")
    size = int(split.table["size"][SAMPLE, format.META])
    whole = text + b" " * (size - len(text) - 1) + (b"}" if text.startswith(b'{"') else b" ")
    key = replace_member(own, format.META, whole)
    (fault,) = verify(own, deep=True).faults
    assert fault.startswith("val/000000.tar: ")
    assert key in fault
    assert words in fault


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("foreground", 1, "its foreground is not the table's"),
        ("height", 61, "its original mask has another size"),
    ],
)
def test_deep_compares_a_sample_with_its_row(own: Path, column: str, value: int, words: str):
    key = replace_member(own, format.IMAGE, b"", **{column: value})
    assert f"val/000000.tar: {key}: {words}" in verify(own, deep=True).faults


def test_a_damaged_table_ends_the_check_in_one_line(own: Path, capsys: pytest.CaptureFixture[str]):
    path = own / format.table_name("train")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptShardError, match=r"samples-train\.npy"):
        verify(own)
    assert run("verify", own) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("member", [format.IMAGE, format.MASK])
def test_a_damaged_member_is_attached_to_the_error(own: Path, member: int):
    split = ShardSet.open(own).split("val")
    start, _ = layout.member_spans(int(split.table["offset"][SAMPLE]), split.table["size"][SAMPLE].tolist())[member]
    data = bytearray((own / split.shards[0]).read_bytes())
    data[start] ^= 1
    (own / split.shards[0]).write_bytes(data)
    with pytest.raises(CorruptShardError) as caught:
        ShardSet.open(own).split("val").read(SAMPLE, member)
    error = caught.value
    assert (error.shard, error.key, error.member) == ("val/000000.tar", split.key(SAMPLE), format.MEMBERS[member])
