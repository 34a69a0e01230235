"""What a prediction leaves behind for each image: a mask, and if asked for its probabilities and a picture of both."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import simplejpeg
from PIL import Image

from shards.errors import SourceError
from shards.files import atomic_file, write_file
from shards.geometry import mask_outline
from shards.inputs.match import MASK_SUFFIX
from shards.inputs.source import File

PROBABILITIES, OVERLAYS = FOLDERS = ("probabilities", "overlays")
LINE = (0, 229, 255)
"""The colour of the contour, RGB: none that skin has."""
LINE_SHARE = 1 / 400
"""Its width, as a share of the picture's longer side."""
JPEG_QUALITY = 90


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """The files of one prediction, all at each image's own resolution.

    FOLDER/KEY_segmentation.png       8 bits, 255 where the lesion is and 0 elsewhere
    FOLDER/probabilities/KEY.png      8 bits; value v: the probability p is in v/256 < p <= (v+1)/256
    FOLDER/overlays/KEY.jpg           the image with the mask's contour
    """

    folder: Path
    probabilities: bool = False
    """Whether the probabilities are written."""
    overlay: bool = False
    """Whether the overlays are written."""

    def make_folders(self) -> None:
        """Make what is not there, and remove what a killed prediction left half written."""
        for path in self._wanted("any"):
            path.parent.mkdir(parents=True, exist_ok=True)
            for torn in path.parent.glob(".*.new"):
                torn.unlink()

    def mask(self, file: File) -> Path:
        """Where the mask of an image lies."""
        return self._mask(_stem(file))

    def is_done(self, file: File) -> bool:
        """Whether all that is wanted of an image is there, made since the image was last changed."""
        wanted = self._wanted(_stem(file))
        return all(path.exists() and path.stat().st_mtime_ns >= file.changed for path in wanted)

    def write(self, file: File, probs: np.ndarray, threshold: float, picture: np.ndarray | None) -> None:
        """Write what is wanted of one image, the mask last: `probs` (H, W) float32 in [0, 1].

        `threshold`: the probability above which a pixel is lesion. `picture` (H, W, 3) uint8, where there is to be
        an overlay.
        """
        stem, mask = _stem(file), probs > threshold
        if self.probabilities:
            write_file(self._probabilities(stem), _png((np.ceil(probs * 256) - 1).clip(0, 255).astype(np.uint8)))
        if picture is not None:
            write_file(self._overlay(stem), simplejpeg.encode_jpeg(outlined(picture, mask), quality=JPEG_QUALITY))
        write_file(self._mask(stem), _png(mask.view(np.uint8) * np.uint8(255)))

    def _wanted(self, stem: str) -> list[Path]:
        extras = [self._probabilities(stem)] * self.probabilities + [self._overlay(stem)] * self.overlay
        return [self._mask(stem), *extras]

    def _mask(self, stem: str) -> Path:
        return self.folder / f"{stem}{MASK_SUFFIX}.png"

    def _probabilities(self, stem: str) -> Path:
        return self.folder / PROBABILITIES / f"{stem}.png"

    def _overlay(self, stem: str) -> Path:
        return self.folder / OVERLAYS / f"{stem}.jpg"


def outlined(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Copy `picture` (H, W, 3) uint8 and draw the outline of `mask` (H, W) bool on it."""
    out = picture.copy()
    out[mask_outline(mask, max(1, round(max(mask.shape) * LINE_SHARE)))] = LINE
    return out


def _stem(file: File) -> str:
    return PurePosixPath(file.name).stem


def _png(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


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
    with atomic_file(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for mask in sorted(masks):
            archive.writestr(zipfile.ZipInfo(mask.name), mask.read_bytes())  # stored: a PNG is compressed already
