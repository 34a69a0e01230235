"""Matching images to masks by name: the layouts of the ISIC archives, and files that have no partner."""

from __future__ import annotations

import pytest

from shards.errors import SourceError
from shards.inputs.match import Pairing, pair_files
from shards.inputs.source import File


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


def test_a_reduced_image_takes_the_mask_of_its_original_only_where_nothing_else_has_it():
    pairing = paired("B.jpg", "B_downsampled.jpg", "B_segmentation.png")
    assert [pair.image.name for pair in pairing.pairs] == ["B.jpg"]
    assert reasons(pairing) == {"B_downsampled.jpg": "no-mask"}
    pairing = paired("B_downsampled.jpg", "B_segmentation.png", "B_downsampled_segmentation.png")
    assert [(pair.key, pair.mask.name) for pair in pairing.pairs] == [
        ("B_downsampled", "B_downsampled_segmentation.png")
    ]
    assert reasons(pairing) == {"B_segmentation.png": "no-image"}
