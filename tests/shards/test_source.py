from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from shards.errors import SourceError
from shards.source import File, Pairing, find, pair_files


def paired(*names: str, suffix: str = "_segmentation") -> Pairing:
    return pair_files([File(0, name, 1) for name in names], suffix)


GOOD = ("in/A.jpg", "gt/A_segmentation.png")


def reasons(pairing: Pairing) -> dict[str, str]:
    return {row.path: row.reason for row in pairing.rejected}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["B.jpg"], {"B.jpg": "no-mask"}),
        (["B_segmentation.png"], {"B_segmentation.png": "no-image"}),
        (["B.1.jpg", "B.1_segmentation.png"], {"B.1.jpg": "illegal-key", "B.1_segmentation.png": "illegal-key"}),
        (["B.tif"], {"B.tif": "unsupported"}),
        (
            ["x/B.jpg", "y/B.jpg", "B_segmentation.png"],
            {"x/B.jpg": "duplicate-key", "y/B.jpg": "duplicate-key", "B_segmentation.png": "duplicate-key"},
        ),
        (["B.jpg", "b.JPG"], {"B.jpg": "duplicate-key", "b.JPG": "duplicate-key"}),
    ],
)
def test_a_file_that_cannot_be_paired_is_rejected_with_its_reason(names: list[str], expected: dict[str, str]):
    pairing = paired(*GOOD, *names)
    assert reasons(pairing) == expected
    assert [pair.key for pair in pairing.pairs] == ["A"]
    assert pairing.found == 2 + len(names)


@pytest.mark.parametrize(
    "name",
    ["A_superpixels.png", "ATTRIBUTION.txt", "LICENSE.txt", "__MACOSX/._A.jpg", ".DS_Store", "a/.hidden/B.jpg"],
)
def test_what_lies_among_the_pictures_of_the_archives_is_ignored_and_counted(name: str):
    pairing = paired(*GOOD, name)
    assert [file.name for file in pairing.ignored] == [name]
    assert not pairing.rejected
    assert pairing.found == 3


@pytest.mark.parametrize(
    ("image", "mask", "suffix"),
    [
        ("A.JPG", "A_Segmentation.png", "_segmentation"),
        ("A.jpeg", "deep/er/A_segmentation.PNG", "_segmentation"),
        ("IMD003/IMD003.bmp", "IMD003/IMD003_lesion.bmp", "_lesion"),
    ],
)
def test_names_of_other_years_and_sets_are_paired(image: str, mask: str, suffix: str):
    (pair,) = paired(image, mask, suffix=suffix).pairs
    assert (pair.image.name, pair.mask.name) == (image, mask)


def test_no_pair_at_all_is_one_error_that_counts_what_there_is():
    with pytest.raises(SourceError, match="1 images, 0 masks named KEY_segmentation"):
        paired("A.jpg")


def test_folder_archive_and_url_list_and_read_the_same(tmp_path: Path):
    folder = tmp_path / "set"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "A.jpg").write_bytes(b"image")
    (folder / "A_segmentation.png").write_bytes(b"mask")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in folder.rglob("*"):
            archive.write(path, path.relative_to(folder))
    for place in (folder, tmp_path / "set.zip", f"file://{folder}", f"file://{tmp_path}/set.zip"):
        (source,), files = find([str(place)])
        assert [(file.name, file.size) for file in files] == [("A_segmentation.png", 4), ("sub/A.jpg", 5)]
        assert source.read("sub/A.jpg") == b"image"
        source.close()


def test_a_folder_inside_the_other_is_listed_once(tmp_path: Path):
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "A_segmentation.png").write_bytes(b"mask")
    (tmp_path / "A.jpg").write_bytes(b"image")
    _, files = find([str(tmp_path), str(tmp_path / "masks")])
    assert len(files) == 2


def test_a_link_that_leads_back_ends_the_walk(tmp_path: Path):
    (tmp_path / "A.jpg").write_bytes(b"image")
    (tmp_path / "again").symlink_to(tmp_path)
    _, files = find([str(tmp_path)])
    assert [file.name for file in files] == ["A.jpg"]


def test_a_missing_an_empty_and_a_torn_place_are_named(tmp_path: Path):
    (tmp_path / "torn.zip").write_bytes(b"PK\3\4 and no more")
    (tmp_path / "empty").mkdir()
    for name, words in [("none", "no such folder"), ("empty", "no file in it"), ("torn.zip", "not a whole zip")]:
        with pytest.raises(SourceError, match=f"{name}: .*{words}"):
            find([str(tmp_path / name)])
