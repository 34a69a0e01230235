"""Output files of a prediction: masks, on request probabilities and overlays, and the archive of a submission."""

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

from isicdist.metrics.examples import PREDICTION_COLOUR
from shards.errors import SourceError
from shards.files import atomic_file, remove_temporary_files, write_file
from shards.geometry import draw_outline
from shards.inputs.match import MASK_SUFFIX
from shards.inputs.source import File

PROBABILITIES, OVERLAYS = FOLDERS = ("probabilities", "overlays")
OUTLINE_SHARE = 1 / 400
"""Width of the outline, as a share of the picture's longer side."""
JPEG_QUALITY = 90
SUBMISSION_ID = re.compile(r"ISIC_[0-9]{7}")
"""Image id that the challenge's scorer accepts."""


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """The files of one prediction, all at each image's own resolution.

    FOLDER/KEY_segmentation.png       8 bits, 255 where the lesion is and 0 elsewhere
    FOLDER/probabilities/KEY.png      8 bits; value v: the probability p is in v/256 < p <= (v+1)/256
    FOLDER/overlays/KEY.jpg           the image with the outline of its mask
    """

    folder: Path
    probabilities: bool = False
    """Write the probabilities, too."""
    overlay: bool = False
    """Write the overlays, too."""

    def make_folders(self) -> None:
        """Create the folders, and remove partial files of a killed prediction."""
        for path in self._requested("any"):
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_temporary_files(path.parent)

    def mask(self, file: File) -> Path:
        """Path of the mask of an image."""
        return self._mask(_stem(file))

    def are_complete(self, file: File) -> bool:
        """Return True if all requested files of an image exist, and none is older than the image."""
        paths = self._requested(_stem(file))
        return all(path.exists() and path.stat().st_mtime_ns >= file.changed for path in paths)

    def write(self, file: File, probs: np.ndarray, threshold: float, picture: np.ndarray | None) -> None:
        """Write the requested files of one image, the mask last: `probs` (H, W) float32 in [0, 1].

        `threshold`: of the probability, above which a pixel is lesion. `picture` (H, W, 3) uint8 RGB for the overlay;
        None writes none.
        """
        stem, mask = _stem(file), probs > threshold
        if self.probabilities:
            write_file(self._probabilities(stem), _png((np.ceil(probs * 256) - 1).clip(0, 255).astype(np.uint8)))
        if picture is not None:
            write_file(self._overlay(stem), simplejpeg.encode_jpeg(overlay_of(picture, mask), quality=JPEG_QUALITY))
        write_file(self._mask(stem), _png(mask.view(np.uint8) * np.uint8(255)))

    def _requested(self, stem: str) -> list[Path]:
        extras = [self._probabilities(stem)] * self.probabilities + [self._overlay(stem)] * self.overlay
        return [self._mask(stem), *extras]

    def _mask(self, stem: str) -> Path:
        return self.folder / f"{stem}{MASK_SUFFIX}.png"

    def _probabilities(self, stem: str) -> Path:
        return self.folder / PROBABILITIES / f"{stem}.png"

    def _overlay(self, stem: str) -> Path:
        return self.folder / OVERLAYS / f"{stem}.jpg"


def overlay_of(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Copy `picture` (H, W, 3) uint8 and draw the outline of `mask` (H, W) bool on it."""
    out = picture.copy()
    draw_outline(out, mask, PREDICTION_COLOUR, max(1, round(max(mask.shape) * OUTLINE_SHARE)))
    return out


def _stem(file: File) -> str:
    return PurePosixPath(file.name).stem


def _png(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def check_ids(files: Sequence[File]) -> None:
    """Raise SourceError for an image whose id the challenge's scorer would not accept."""
    for file in files:
        if not SUBMISSION_ID.fullmatch(PurePosixPath(file.name).stem):
            raise SourceError(
                f"{file.name}: an image of a submission is named ISIC_ and seven digits; predict without --submission"
            )


def write_submission(path: Path, masks: Sequence[Path]) -> None:
    """Write the masks into a flat zip archive; the same masks give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for mask in sorted(masks):
            archive.writestr(zipfile.ZipInfo(mask.name), mask.read_bytes())  # stored: a PNG is compressed already
