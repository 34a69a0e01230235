"""Decode and check one image with its mask, whatever modes, depths and rotations they come in."""

from __future__ import annotations

import io
import math
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image

from shards import format
from shards.geometry import Fit
from shards.source import MAX_FILE_BYTES, File, Pair, Rejected, Source

FORMATS = ("JPEG", "PNG", "BMP")
EXIF_ORIENTATION = 0x0112
JPEG_END = b"\xff\xd9"
SCALE_MARGIN = 2  # a JPEG is decoded at no less than this times the size it is shown at: 39 dB or more from in full
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's decoders, simplejpeg and zipfile raise on damaged bytes.
DAMAGE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    RuntimeError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)


class BadPairError(Exception):
    """A pair that cannot be used: which file of it, the reason code and the detail."""

    def __init__(self, file: File, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.file, self.reason, self.detail = file, reason, detail

    def rejected(self, pair: Pair) -> list[Rejected]:
        """A row for each of the two files."""
        partner = pair.mask if self.file is pair.image else pair.image
        return [
            Rejected(self.file.name, self.reason, self.detail),
            Rejected(partner.name, "partner", f"{self.file.name} was rejected"),
        ]


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """A checked pair, the image upright and the mask the same way round."""

    picture: Image.Image
    """The image, RGB; it may be decoded at a reduced scale."""
    fit: Fit
    """How the upright original is fitted."""
    mask: np.ndarray
    """(H, W) uint8 at the original resolution, 1 where the lesion is."""
    flags: list[str]
    """What is odd without being wrong: constant-mask, grey-mask (values between black and white)."""
    jpeg: bytes | None
    """The source's bytes, where they are an upright RGB JPEG that can be copied as they are."""


def load(pair: Pair, sources: list[Source], kind: str, side: int | None) -> Decoded:
    """Read, decode and check a pair, to be fitted as `Fit.plan` says with `kind` and `side`.

    A JPEG is decoded at a reduced scale where that is enough for the fit. Raises BadPairError.
    """
    data = _bytes(pair.image, sources)
    picture = _header(pair.image, data)
    mask_picture = _header(pair.mask, _bytes(pair.mask, sources))
    with _damage_named(pair.mask):
        mask, flags = _mask(pair.mask, mask_picture)
        own_turn = _orientation(mask_picture)
    with _damage_named(pair.image):
        turn = _orientation(picture)
    mask_turn = _turn_of_mask(pair, picture, mask_picture, turn, own_turn)
    rgb_jpeg = picture.format == "JPEG" and picture.mode == "RGB"
    width, height = picture.size[::-1] if turn >= 5 else picture.size
    fit = Fit.plan(kind, height, width, side)
    with _damage_named(pair.image):
        image = _rgb_of_jpeg(data, picture, fit if turn == 1 else None) if rgb_jpeg else _rgb(picture)
    if turn != 1:
        image = image.transpose(TURNS[turn])
    if mask_turn != 1:
        mask = np.asarray(Image.fromarray(mask).transpose(TURNS[mask_turn]))
    return Decoded(picture=image, fit=fit, mask=mask, flags=flags, jpeg=data if rgb_jpeg and turn == 1 else None)


def load_image(file: File, sources: list[Source], kind: str, side: int | None) -> tuple[Image.Image, Fit]:
    """Read and decode one image that has no mask: upright, RGB, and how it is to be fitted. Raises BadPairError."""
    data = _bytes(file, sources)
    picture = _header(file, data)
    with _damage_named(file):
        turn = picture.getexif().get(EXIF_ORIENTATION, 1)
        image = _rgb(picture)
        if turn in TURNS and turn != 1:
            image = image.transpose(TURNS[turn])
    return image, Fit.plan(kind, image.height, image.width, side)


def thumbnail(file: File, sources: list[Source], side: int) -> np.ndarray:
    """An image as (side, side) uint8, grey, upright and stretched, from a small decode. Raises BadPairError."""
    data = _bytes(file, sources)
    picture = _header(file, data)
    with _damage_named(file):
        turn = _orientation(picture)
        if picture.format == "JPEG" and picture.mode in ("RGB", "L"):
            least = SCALE_MARGIN * side
            grey = Image.fromarray(simplejpeg.decode_jpeg(data, "GRAY", min_height=least, min_width=least)[..., 0])
        else:
            grey = _rgb(picture).convert("L")
        grey = grey.resize((side, side), Image.Resampling.BOX)
        return np.asarray(grey if turn == 1 else grey.transpose(TURNS[turn]))


def _bytes(file: File, sources: list[Source]) -> bytes:
    if file.size > MAX_FILE_BYTES:
        raise BadPairError(file, "pixel-limit", f"{file.size} bytes, more than {MAX_FILE_BYTES}")
    with _damage_named(file):
        data = sources[file.source].read(file.name)
    if not data:
        raise BadPairError(file, "truncated", "the file is empty")
    return data


def _header(file: File, data: bytes) -> Image.Image:
    """The picture with its header read and its size within the limit."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is ours
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadPairError(file, "pixel-limit", str(error)) from error
    except DAMAGE as error:
        raise BadPairError(file, "unreadable", "not a whole JPEG, PNG or BMP header") from error
    if picture.width * picture.height > format.MAX_PIXELS:
        detail = f"{picture.width} × {picture.height} pixels, more than {format.MAX_PIXELS}"
        raise BadPairError(file, "pixel-limit", detail)
    return picture


@contextmanager
def _damage_named(file: File) -> Iterator[None]:
    """Turn what a decoder raises on damaged bytes into a BadPairError for `file`."""
    try:
        yield
    except DAMAGE as error:
        text = str(error) or type(error).__name__
        short = any(word in text.lower() for word in ("truncated", "premature end", "unexpected end"))
        raise BadPairError(file, "truncated" if short else "unreadable", text) from error


def _rgb_of_jpeg(data: bytes, picture: Image.Image, fit: Fit | None) -> Image.Image:
    """The picture in full, or at a reduced scale that still has SCALE_MARGIN times the pixels that `fit` shows."""
    height = width = 0
    if fit is not None:
        left, top, right, bottom = fit.source
        scale = max(fit.target[2] - fit.target[0], 1) / (right - left)
        scale = SCALE_MARGIN * max(scale, max(fit.target[3] - fit.target[1], 1) / (bottom - top))
        if scale < 1:
            height, width = (math.ceil(length * scale) for length in fit.original)
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
    except ValueError as error:
        # libjpeg warns of stray bytes between two markers, which cost no pixel; Pillow reads past them.
        if "extraneous bytes" not in str(error):
            if not data.rstrip(b"\0").endswith(JPEG_END):
                raise OSError(f"truncated: no end of image after {len(data)} bytes") from error
            raise
        return picture.convert("RGB")
    return Image.fromarray(pixels)


def _rgb(picture: Image.Image) -> Image.Image:
    """Any mode as RGB: 16 bits by their upper byte, palettes looked up, transparency dropped."""
    if picture.mode.startswith("I"):
        return Image.fromarray(_upper_byte(picture)).convert("RGB")
    if picture.mode in ("P", "PA"):
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


def _upper_byte(picture: Image.Image) -> np.ndarray:
    return (np.asarray(picture).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)


def _mask(file: File, picture: Image.Image) -> tuple[np.ndarray, list[str]]:
    """The mask (H, W) uint8 of 0 and 1, and its flags."""
    if picture.mode == "L":
        values = np.asarray(picture)
    elif picture.mode == "1":
        values = np.asarray(picture.convert("L"))
    elif picture.mode.startswith("I"):
        values = _upper_byte(picture)
    else:
        # A lesion may be marked in colour, so its brightest channel counts.
        values = np.asarray(_rgb(picture)).max(axis=2)
    mask = values > format.FOREGROUND
    flags = []
    if np.count_nonzero(mask) in (0, mask.size):
        flags.append("constant-mask")
    if np.count_nonzero(values) != np.count_nonzero(values == 255):
        levels = np.flatnonzero(np.bincount(values.ravel(), minlength=256))
        if levels[-1] <= format.FOREGROUND:
            detail = f"its values are {levels[0]} to {levels[-1]}, none above {format.FOREGROUND}; lesion must be 255"
            raise BadPairError(file, "mask-values", detail)
        if len(levels) > 2:
            flags.append("grey-mask")
    return mask.view(np.uint8), flags


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation to undo; 1 for none."""
    turn = picture.getexif().get(EXIF_ORIENTATION, 1)
    return turn if turn in TURNS else 1


def _turn_of_mask(pair: Pair, image: Image.Image, mask: Image.Image, turn: int, own_turn: int) -> int:
    """The orientation to undo in the mask, when the image has `turn` and the mask `own_turn`.

    A mask says nothing of its own as a rule: it was drawn on the upright image, or on the stored pixels and
    then turns with them. The sizes say which. Where they cannot (a half turn, a square), the pair is refused.
    """
    upright = image.size[::-1] if turn >= 5 else image.size
    mask_size = mask.size[::-1] if own_turn >= 5 else mask.size
    if own_turn != 1 and mask_size == upright:
        return own_turn
    if mask.size != upright and mask.size != image.size:
        detail = "the image is {} × {}, the mask {} × {}".format(*upright, *mask_size)
        raise BadPairError(pair.mask, "size-mismatch", detail)
    if turn == 1:
        return 1
    if upright == image.size:
        detail = f"EXIF orientation {turn}: the mask fits it both ways; turn the image's pixels and drop the tag"
        raise BadPairError(pair.image, "orientation", detail)
    return 1 if mask.size == upright else turn
