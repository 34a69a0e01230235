"""Decode and check one image with its mask: any mode, bit depth and EXIF orientation of a JPEG, PNG or BMP.

`load_pair` decodes; `read_raw_pair` finds the pairs that can be copied as they are.
"""

from __future__ import annotations

import io
import lzma
import math
import struct
import warnings
import zipfile
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image

from shards import codecs
from shards.errors import SourceError, ToolkitError
from shards.geometry import ResizePlan
from shards.inputs.binary_png import decode_binary_png
from shards.inputs.depth import reduce_to_8_bits, split_alpha, wide_values
from shards.inputs.headers import plain_jpeg, plain_png
from shards.inputs.masks import MaskValueError, read_mask
from shards.inputs.match import Pair, Rejected
from shards.inputs.source import MAX_FILE_BYTES, MISSING, File, Source
from shards.jpeg import JPEG_END, decode_jpeg

FORMATS = ("JPEG", "PNG", "BMP")
EXIF_ORIENTATION = 0x0112
# A JPEG is decoded at a SCALE of its size where that is at least SCALE_MARGIN times the target size: those that
# libjpeg-turbo computes with SIMD instructions; between a half and the whole, decoding in full is the quickest. Of 40
# real photographs, resized to 512 pixels, half are decoded in full, and the others have a PSNR (peak signal-to-noise
# ratio) of 51 dB or more against the same one decoded in full; at 64 to 768 pixels all have MIN_SCALED_PSNR or more.
# Storing them as JPEG costs more: 36 to 47 dB.
SCALES = (8, 4, 2)  # one of so many pixels of each row and column
SCALE_MARGIN = 4 / 3
MIN_SCALED_PSNR = 38
MIN_SCALED_SIDE = 64  # pixels of each side of a scaled JPEG: enough for the perceptual hash
# How the pixels are turned upright, by EXIF orientation. `PIL.ImageOps.exif_transpose` has the same table, but also
# writes the EXIF block anew, and so fails on a damaged tag anywhere in it.
TRANSPOSE_OF = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Raised by Pillow's decoders, simplejpeg and zipfile on damaged bytes.
DECODE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    RuntimeError,
    struct.error,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
)


class BadPairError(Exception):
    """Pair that cannot be used: `file` is the bad one of the two, `reason` a key of `REASONS`, `detail` a text."""

    def __init__(self, file: File, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.file, self.reason, self.detail = file, reason, detail

    def rejected(self, pair: Pair) -> list[Rejected]:
        """Rows for the list of rejected files: the bad one, and its partner."""
        partner = pair.mask if self.file is pair.image else pair.image
        return [
            Rejected(self.file.name, self.reason, self.detail),
            Rejected(partner.name, "partner", f"{self.file.name} was rejected"),
        ]


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """A decoded and checked pair: the image upright, and the mask with it."""

    picture: Image.Image
    """The image, RGB; it may be decoded at a reduced scale."""
    resize_plan: ResizePlan
    """Resizing of the upright original to the square."""
    mask: np.ndarray
    """The mask at its original resolution, (H, W) uint8: 255 where the lesion is, else 0."""
    flags: list[str]
    """Oddities that are no errors: constant-mask, grey-mask (values between black and white)."""
    jpeg: bytes | None
    """The source's bytes, where they are an upright RGB JPEG that can be copied as they are."""


def load_pair(pair: Pair, sources: list[Source], mode: str, side: int | None) -> Decoded:
    """Read, decode and check a pair, to be resized by `ResizePlan.of` with `mode` and `side`.

    A JPEG is decoded at a reduced scale where that is enough for the resized image, or where its bytes can be copied
    (every byte of it is read all the same). Raises BadPairError.
    """
    data, mask_data = read_input(pair.image, sources), read_input(pair.mask, sources)
    picture, mask_picture = _header(pair.image, data), _header(pair.mask, mask_data)
    with _as_bad_pair(pair.mask):
        _check_jpeg(mask_picture, mask_data)
        binary = decode_binary_png(mask_data)
        mask, flags = read_mask(mask_picture, binary)
        mask_tag = _orientation(mask_picture) if binary is None else 1
    rgb_jpeg = _is_rgb_jpeg(picture)
    with _as_bad_pair(pair.image):
        image = None if rgb_jpeg else _checked_rgb(picture, data)  # before its EXIF: see `upright_rgb`
        orientation = _orientation(picture)
    mask_orientation = _mask_orientation(pair, picture, mask_picture, orientation, mask_tag)
    width, height = _upright_size(picture, orientation)
    plan = ResizePlan.of(mode, height, width, side)
    if max(plan.size) > codecs.MAX_JPEG_SIDE and not (rgb_jpeg and orientation == 1):
        detail = f"{width} × {height} pixels, more than the {codecs.MAX_JPEG_SIDE} of a JPEG's side"
        raise BadPairError(pair.image, "pixel-limit", detail)
    if image is None:
        with _as_bad_pair(pair.image):
            image = Image.fromarray(decode_jpeg(data, min_size=_min_decoded_size(plan) if orientation == 1 else (0, 0)))
    return Decoded(
        picture=_upright(image, orientation),
        resize_plan=plan,
        mask=mask if mask_orientation == 1 else np.asarray(_upright(Image.fromarray(mask), mask_orientation)),
        flags=flags,
        jpeg=data if rgb_jpeg and orientation == 1 else None,
    )


@dataclass(frozen=True, kw_only=True)
class RawPair:
    """Bytes of a pair that can be copied as they are: an upright RGB JPEG and a grey PNG of its size."""

    jpeg: bytes
    png: bytes
    resize_plan: ResizePlan
    """The plan that changes nothing: it has the original's size."""
    has_lesion: bool
    """The mask is not empty."""


def read_raw_pair(pair: Pair, sources: list[Source]) -> RawPair | None:
    """Read a pair of an upright RGB JPEG and a grey PNG of its size, and decode both as a check; None for any other.

    A reader of the set can read what is returned. A pair that gets None is for `load_pair`, which converts it or names
    what is wrong. Raises BadPairError.
    """
    jpeg, png = read_input(pair.image, sources), read_input(pair.mask, sources)
    size = plain_png(png)
    if size is None or not jpeg.endswith(JPEG_END):
        return None
    if plain_jpeg(jpeg) != size:  # ask Pillow, which knows EXIF, profiles and much else
        picture = _header(pair.image, jpeg)
        with _as_bad_pair(pair.image):
            upright = _orientation(picture) == 1
        if not upright or not _is_rgb_jpeg(picture) or picture.size != size:
            return None
    with _as_bad_pair(pair.image):
        decode_jpeg(jpeg, min_size=(1, 1))  # at an eighth, which takes half of the time; damage shows all the same
    with _as_bad_pair(pair.mask):
        mask, _ = read_mask(_header(pair.mask, png), decode_binary_png(png))
    plan = ResizePlan.of("original", size[1], size[0], None)
    return RawPair(jpeg=jpeg, png=png, resize_plan=plan, has_lesion=bool(mask.any()))


def load_image(file: File, sources: list[Source], mode: str, side: int | None) -> tuple[Image.Image, ResizePlan]:
    """Read and decode one image without a mask, in full; the upright RGB image and its plan by `mode` and `side`.

    Raises BadPairError.
    """
    data = read_input(file, sources)
    picture = _header(file, data)
    with _as_bad_pair(file):
        image = Image.fromarray(decode_jpeg(data)) if _is_rgb_jpeg(picture) else _checked_rgb(picture, data)
        image = _upright(image, _orientation(picture))  # after the decoding: see `upright_rgb`
    return image, ResizePlan.of(mode, image.height, image.width, side)


def upright_rgb(picture: Image.Image) -> Image.Image:
    """Convert a picture of any mode to RGB, turned upright by its EXIF orientation; decodes what is not yet decoded.

    16 bits are reduced by the range that they use (`shards.inputs.depth`), palettes looked up, transparency dropped.
    """
    image = _rgb(picture)  # before its EXIF: to find that of a PNG, Pillow decodes it, and keeps 8 of 16 bits
    return _upright(image, _orientation(picture))


def read_input(file: File, sources: list[Source]) -> bytes:
    """Read an input file whole. Raises BadPairError when it is too large, unreadable or empty."""
    if file.size == MISSING:
        raise BadPairError(file, "unreadable", "a link to a file that does not exist")
    if file.size > MAX_FILE_BYTES:
        raise BadPairError(file, "pixel-limit", f"{file.size} bytes, more than {MAX_FILE_BYTES}")
    with _as_bad_pair(file):
        try:
            data = sources[file.source].read(file.name)
        except (FileNotFoundError, SourceError) as error:  # no bad input: moved, or another machine does not see it
            name = error.filename if isinstance(error, OSError) and error.filename else file.name
            raise ToolkitError(f"{name} was there and is gone; leave the sources as they are, and run again") from error
    if not data:
        raise BadPairError(file, "truncated", "the file is empty")
    return data


def _header(file: File, data: bytes) -> Image.Image:
    """Read the header of a picture, and check its format and its number of pixels. Raises BadPairError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of many pixels: the limit is below; of damaged tags: see `_orientation`
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadPairError(file, "pixel-limit", str(error)) from error
    except DECODE_ERRORS as error:
        raise BadPairError(file, "unreadable", "not a whole JPEG, PNG or BMP header") from error
    if picture.width * picture.height > codecs.MAX_PIXELS:
        detail = f"{picture.width} × {picture.height} pixels, more than {codecs.MAX_PIXELS}"
        raise BadPairError(file, "pixel-limit", detail)
    return picture


@contextmanager
def _as_bad_pair(file: File) -> Generator[None]:
    """Re-raise a decoder's error on damaged bytes, or an ambiguous mask, as BadPairError for `file`."""
    try:
        yield
    except MaskValueError as error:
        raise BadPairError(file, "mask-values", str(error)) from error
    except DECODE_ERRORS as error:
        text = str(error) or type(error).__name__
        short = any(word in text.lower() for word in ("truncated", "premature end", "unexpected end"))
        raise BadPairError(file, "truncated" if short else "unreadable", text) from error


def _min_decoded_size(plan: ResizePlan) -> tuple[int, int]:
    """Least (height, width) in pixels to which an upright JPEG may be scaled when decoded; (0, 0): not at all."""
    if plan.mode == "original":
        return MIN_SCALED_SIDE, MIN_SCALED_SIDE
    source, target = plan.source, plan.target
    enlarged = max((target[2] - target[0]) / (source[2] - source[0]), (target[3] - target[1]) / (source[3] - source[1]))
    for scale in SCALES:
        height, width = (math.ceil(length / scale) for length in plan.original)
        if SCALE_MARGIN * enlarged * scale <= 1 and min(height, width) >= MIN_SCALED_SIDE:
            return height, width
    return 0, 0


def _is_rgb_jpeg(picture: Image.Image) -> bool:
    return picture.format == "JPEG" and picture.mode == "RGB"


def _checked_rgb(picture: Image.Image, data: bytes) -> Image.Image:
    """Convert a picture that is no RGB JPEG to RGB. Raises one of DECODE_ERRORS."""
    _check_jpeg(picture, data)
    return _rgb(picture)


def _check_jpeg(picture: Image.Image, data: bytes) -> None:
    """Raise ValueError for damage in a picture that is a JPEG and is to be decoded by Pillow, which ignores it."""
    if picture.format in ("JPEG", "MPO"):  # MPO: several JPEGs in a file, the first of which is the photograph
        decode_jpeg(data, min_size=(1, 1))


def _rgb(picture: Image.Image) -> Image.Image:
    """Convert any mode to RGB: 16 bits reduced by their range, palettes looked up, transparency dropped."""
    values = wide_values(picture)
    if values is not None:
        colours = reduce_to_8_bits(split_alpha(values)[0])
        return Image.fromarray(np.ascontiguousarray(np.broadcast_to(colours, (*colours.shape[:2], 3))))
    if picture.mode in ("P", "PA"):
        picture = picture.convert("RGBA")
    picture.load()
    return picture if picture.mode == "RGB" else picture.convert("RGB")  # which would copy it


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 2 to 8; 1 where there is none, or one that EXIF does not have."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damaged tags, which are left out
        orientation = picture.getexif().get(EXIF_ORIENTATION, 1)
    return orientation if orientation in TRANSPOSE_OF else 1


def _upright(picture: Image.Image, orientation: int) -> Image.Image:
    """Undo an EXIF orientation."""
    return picture if orientation == 1 else picture.transpose(TRANSPOSE_OF[orientation])


def _upright_size(picture: Image.Image, orientation: int) -> tuple[int, int]:
    """(width, height) of a picture once its EXIF orientation is undone."""
    width, height = picture.size
    return (height, width) if orientation >= 5 else (width, height)


def _mask_orientation(pair: Pair, image: Image.Image, mask: Image.Image, orientation: int, mask_tag: int) -> int:
    """The EXIF orientation to undo in the mask, when the image has `orientation` and the mask's own tag is `mask_tag`.

    A mask has no tag as a rule: it was drawn on the upright image, or on the stored pixels and then turns with them.
    The sizes tell which of the two. Where they cannot (a half turn, a square), BadPairError is raised.
    """
    upright, mask_size = _upright_size(image, orientation), _upright_size(mask, mask_tag)
    if mask_tag != 1 and mask_size == upright:
        return mask_tag
    if mask.size != upright and mask.size != image.size:
        detail = "the image is {} × {}, the mask {} × {}".format(*upright, *mask_size)
        raise BadPairError(pair.mask, "size-mismatch", detail)
    if orientation == 1:
        return 1
    if upright == image.size:
        detail = f"EXIF orientation {orientation}: the mask fits it both ways; turn the image's pixels and drop the tag"
        raise BadPairError(pair.image, "orientation", detail)
    return 1 if mask.size == upright else orientation
