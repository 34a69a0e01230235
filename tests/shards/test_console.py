"""Console output: tables of a set, of a build and of rejected inputs."""

from __future__ import annotations

import hashlib
import io
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shards import console, format
from shards.build import build
from shards.format import FileEntry, Index, SplitEntry
from shards.inputs.match import Rejected
from shards.planning.plan import BuildOptions
from shards.reader import ShardSet


@pytest.fixture(scope="module")
def built(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    out = tmp_path_factory.mktemp("info") / "set"
    build(str(pictures), str(pictures), out, BuildOptions(size=32), workers=1)
    return ShardSet.open(out)


def test_info_shows_what_the_index_and_the_tables_say(built: ShardSet, capsys: pytest.CaptureFixture[str]):
    console.print_info(built)
    shown = capsys.readouterr().out
    assert "80 found = 80 packed + 0 rejected + 0 ignored" in shown
    assert built.digest in shown
    train = built.split("train")
    shares = [train.mask(index).mean() for index in range(len(train))]
    areas = " / ".join(f"{share:.0%}" for share in np.quantile(shares, (0.1, 0.5, 0.9)))
    size = built.index.splits["train"].shards[0].bytes / 1e6
    row = next(line for line in shown.splitlines() if "train" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "train", "1", str(len(train)), f"{size:.1f}", "80 × 60", areas,
    ]  # fmt: skip


def test_a_set_of_an_older_version_is_shown_without_what_it_does_not_know(
    built: ShardSet, capsys: pytest.CaptureFixture[str]
):
    index = built.index.to_json()
    del index["counts"]["duplicates"], index["counts"]["duplicates_across_splits"], index["built"]
    console.print_info(ShardSet(root=built.root, index=Index.from_json(index)))
    assert "duplicates  unknown: an older version has built this set" in capsys.readouterr().out


def test_what_was_left_out_is_shown_by_reason(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = Path(shutil.copytree(pictures, tmp_path / "in"))
    (folder / "ISIC_0000003.jpg").write_bytes(b"no picture")
    (folder / "ISIC_0000005_segmentation.png").unlink()
    (folder / b"bad\xff.jpg".decode(errors="surrogateescape")).write_bytes(b"")
    options = BuildOptions(size=32, on_bad_input="skip")
    build(str(folder), str(folder), tmp_path / "set", options, workers=1)
    console.print_info(ShardSet.open(tmp_path / "set"))
    shown = capsys.readouterr().out
    assert "80 found = 76 packed + 4 rejected + 0 ignored" in shown
    assert "rejected  1 illegal-key, 1 no-mask, 1 partner, 1 unreadable" in shown
    assert "bad\\udcff.jpg,illegal-key" in (tmp_path / "set" / format.REJECTED_NAME).read_text()


def test_names_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]):
    path = "[bold]a" + "/long" * 20 + "[/b].jpg"
    console.print_rejected([Rejected(path, "illegal-key", "key 'b[red]'")])
    shown = capsys.readouterr().err
    assert path in shown
    assert "key 'b[red]'" in shown


def test_info_of_an_empty_split(capsys: pytest.CaptureFixture[str], built: ShardSet, tmp_path: Path):
    buffer = io.BytesIO()
    np.save(buffer, np.empty(0, format.sample_dtype(1)))
    (tmp_path / "samples-train.npy").write_bytes(buffer.getvalue())
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    table = FileEntry(name="samples-train.npy", bytes=len(buffer.getvalue()), sha256=digest)
    index = replace(built.index, splits={"train": SplitEntry(samples=0, table=table, shards=())})
    console.print_info(ShardSet(root=tmp_path, index=index))
    assert "│ train │      0 │       0 │ 0.0 │             - │           - │" in capsys.readouterr().out
