"""Sources: a folder, a .zip archive and a URL list and read the same; broken ones are named."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from shards.errors import SourceError
from shards.inputs.source import open_sources


def test_folder_archive_and_url_list_and_read_the_same(tmp_path: Path):
    folder = tmp_path / "set"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "A.jpg").write_bytes(b"image")
    (folder / "A_segmentation.png").write_bytes(b"mask")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in folder.rglob("*"):
            archive.write(path, path.relative_to(folder))
    for place in (folder, tmp_path / "set.zip", f"file://{folder}", f"file://{tmp_path}/set.zip"):
        (source,), files = open_sources([str(place)])
        assert [(file.name, file.size) for file in files] == [("A_segmentation.png", 4), ("sub/A.jpg", 5)]
        assert source.read("sub/A.jpg") == b"image"
        source.close()


def test_a_folder_inside_the_other_is_listed_once(tmp_path: Path):
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "A_segmentation.png").write_bytes(b"mask")
    (tmp_path / "A.jpg").write_bytes(b"image")
    _, files = open_sources([str(tmp_path), str(tmp_path / "masks")])
    assert len(files) == 2


def test_a_link_that_leads_back_ends_the_walk(tmp_path: Path):
    (tmp_path / "A.jpg").write_bytes(b"image")
    (tmp_path / "again").symlink_to(tmp_path)
    _, files = open_sources([str(tmp_path)])
    assert [file.name for file in files] == ["A.jpg"]


def test_a_missing_an_empty_and_a_torn_place_are_named(tmp_path: Path):
    (tmp_path / "torn.zip").write_bytes(b"PK\3\4 and no more")
    (tmp_path / "empty").mkdir()
    for name, words in [("none", "no such folder"), ("empty", "no file in it"), ("torn.zip", "not a whole zip")]:
        with pytest.raises(SourceError, match=f"{name}: .*{words}"):
            open_sources([str(tmp_path / name)])
