"""A submission to ISIC 2018 Task 1: one flat zip archive of ISIC_0012345_segmentation.png, one per image."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from isicdist.files import published
from shards.errors import SourceError
from shards.source import File

NAME = re.compile(r"ISIC_[0-9]{7}")
"""What the challenge's scorer knows an image by."""


def check_ids(files: Sequence[File]) -> None:
    """Raise SourceError for an image that the scorer would not know."""
    for file in files:
        if not NAME.fullmatch(PurePosixPath(file.name).stem):
            raise SourceError(
                f"{file.name}: an image of a submission is named ISIC_ and seven digits; predict without --submission"
            )


def write_submission(path: Path, masks: Sequence[Path]) -> None:
    """Publish the archive: the same masks give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with published(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for mask in sorted(masks):
            archive.writestr(zipfile.ZipInfo(mask.name), mask.read_bytes())  # stored: a PNG is compressed already
