"""Decode and check one image with its mask, whatever modes, depths and rotations they come in."""

from __future__ import annotations

import io
import math
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image

from shards import codecs
from shards.errors import ToolkitError
from shards.geometry import ResizePlan
from shards.inputs.headers import JPEG_END, plain_jpeg, plain_png
from shards.inputs.match import Pair, Rejected
from shards.inputs.source import MAX_FILE_BYTES, File, FolderSource, Source

FORMATS = ("JPEG", "PNG", "BMP")
EXIF_ORIENTATION = 0x0112
# A JPEG is decoded at no less than SCALE_MARGIN times the size it is shown at. Fitted from that to 64 to 768 pixels,
# every one of 40 real photographs is SCALED_DB or nearer (peak signal-to-noise ratio) to itself decoded in full, 19
# of 20 are 43 dB or nearer; those of 2048 x 1536 at 512 pixels are 41 dB. Storing them as JPEG costs 36 to 47 dB.
SCALE_MARGIN = 1.5
SCALED_DB = 38
LEAST_SIDE = 64  # pixels that a scaled JPEG keeps: enough to look for duplicates
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
    fit: ResizePlan
    """How the upright original is fitted."""
    mask: Image.Image
    """Grey at the original resolution: 255 where the lesion is, else 0."""
    flags: list[str]
    """What is odd without being wrong: constant-mask, grey-mask (values between black and white)."""
    jpeg: bytes | None
    """The source's bytes, where they are an upright RGB JPEG that can be copied as they are."""


def load(pair: Pair, sources: list[Source], kind: str, side: int | None) -> Decoded:
    """Read, decode and check a pair, to be fitted as `ResizePlan.of` says with `kind` and `side`.

    A JPEG is decoded at a reduced scale where that is enough for the fit, or where its bytes can be copied (which
    reads every byte of it all the same). Raises BadPairError.
    """
    data = _bytes(pair.image, sources)
    picture = _header(pair.image, data)
    mask_picture = _header(pair.mask, _bytes(pair.mask, sources))
    with _as_bad_pair(pair.mask):
        mask, flags = _mask(pair.mask, mask_picture)
        own_turn = _orientation(mask_picture)
    with _as_bad_pair(pair.image):
        turn = _orientation(picture)
    mask_turn = _turn_of_mask(pair, picture, mask_picture, turn, own_turn)
    rgb_jpeg = picture.format == "JPEG" and picture.mode == "RGB"
    width, height = picture.size[::-1] if turn >= 5 else picture.size
    fit = ResizePlan.of(kind, height, width, side)
    with _as_bad_pair(pair.image):
        image = _rgb_of_jpeg(data, picture, _least_size(fit) if turn == 1 else (0, 0)) if rgb_jpeg else _rgb(picture)
    if turn != 1:
        image = image.transpose(TURNS[turn])
    if mask_turn != 1:
        mask = mask.transpose(TURNS[mask_turn])
    return Decoded(picture=image, fit=fit, mask=mask, flags=flags, jpeg=data if rgb_jpeg and turn == 1 else None)


@dataclass(frozen=True, kw_only=True)
class RawPair:
    """A pair that can be copied as it is: its bytes, by whose headers nothing is odd."""

    jpeg: bytes
    png: bytes
    fit: ResizePlan


def read_raw_pair(pair: Pair, sources: list[Source]) -> RawPair | None:
    """A pair of an upright RGB JPEG and a grey PNG of its size, both whole by their headers; None for any other.

    Nothing is decoded. Whatever is odd is for `load`, which says what is wrong with it. Raises BadPairError.
    """
    jpeg, png = _bytes(pair.image, sources), _bytes(pair.mask, sources)
    size = plain_png(png)
    if size is None or not jpeg.endswith(JPEG_END):
        return None
    if plain_jpeg(jpeg) != size:  # ask Pillow, which knows EXIF, profiles and much else
        picture = _header(pair.image, jpeg)
        with _as_bad_pair(pair.image):
            upright = _orientation(picture) == 1
        if not upright or (picture.format, picture.mode, picture.size) != ("JPEG", "RGB", size):
            return None
    return RawPair(jpeg=jpeg, png=png, fit=ResizePlan.of("original", size[1], size[0], None))


def probe_raw_pair(pair: Pair, images: FolderSource, sources: list[Source]) -> tuple[ResizePlan, bytes] | None:
    """Geometry, and head and tail bytes of the image, of a pair that can be copied undecoded; None for any other.

    `images`: where the image lies. What is between its ends is read only where they do not tell. Raises BadPairError.
    """
    ends = _read_checked(pair.image, images.read_ends)
    size = plain_jpeg(ends)
    if size is not None and plain_png(_bytes(pair.mask, sources)) == size:
        return ResizePlan.of("original", size[1], size[0], None), ends
    whole = read_raw_pair(pair, sources)
    return (whole.fit, ends) if whole else None


def load_image(file: File, sources: list[Source], kind: str, side: int | None) -> tuple[Image.Image, ResizePlan]:
    """Read and decode one image that has no mask: upright, RGB, and how it is to be fitted. Raises BadPairError."""
    data = _bytes(file, sources)
    picture = _header(file, data)
    with _as_bad_pair(file):
        turn = picture.getexif().get(EXIF_ORIENTATION, 1)
        image = _rgb(picture)
        if turn in TURNS and turn != 1:
            image = image.transpose(TURNS[turn])
    return image, ResizePlan.of(kind, image.height, image.width, side)


def _bytes(file: File, sources: list[Source]) -> bytes:
    return _read_checked(file, sources[file.source].read)


def _read_checked(file: File, read: Callable[[str], bytes]) -> bytes:
    """What `read`, of the file's source, gives of it; never nothing."""
    if file.size > MAX_FILE_BYTES:
        raise BadPairError(file, "pixel-limit", f"{file.size} bytes, more than {MAX_FILE_BYTES}")
    with _as_bad_pair(file):
        try:
            data = read(file.name)
        except FileNotFoundError as error:  # no bad input: another machine does not see it, or somebody is at work
            raise ToolkitError(
                f"{error.filename or file.name} was there and is gone; leave the sources as they are, and run again"
            ) from error
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
    if picture.width * picture.height > codecs.MAX_PIXELS:
        detail = f"{picture.width} × {picture.height} pixels, more than {codecs.MAX_PIXELS}"
        raise BadPairError(file, "pixel-limit", detail)
    return picture


@contextmanager
def _as_bad_pair(file: File) -> Iterator[None]:
    """Turn what a decoder raises on damaged bytes into a BadPairError for `file`."""
    try:
        yield
    except DAMAGE as error:
        text = str(error) or type(error).__name__
        short = any(word in text.lower() for word in ("truncated", "premature end", "unexpected end"))
        raise BadPairError(file, "truncated" if short else "unreadable", text) from error


def _least_size(fit: ResizePlan) -> tuple[int, int]:
    """(height, width) in pixels at which an upright JPEG is good enough; (0, 0): in full."""
    if fit.mode == "original":
        return LEAST_SIDE, LEAST_SIDE
    left, top, right, bottom = fit.source
    scale = max(fit.target[2] - fit.target[0], 1) / (right - left)
    scale = SCALE_MARGIN * max(scale, max(fit.target[3] - fit.target[1], 1) / (bottom - top))
    if scale >= 1:
        return 0, 0
    height, width = (max(math.ceil(length * scale), LEAST_SIDE) for length in fit.original)
    return height, width


def _rgb_of_jpeg(data: bytes, picture: Image.Image, least: tuple[int, int]) -> Image.Image:
    """The picture in full, or at the smallest scale that keeps `least` (height, width) pixels."""
    height, width = least
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width, fastdct=False)
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
    picture.load()
    return picture if picture.mode == "RGB" else picture.convert("RGB")  # which would copy it


def _upper_byte(picture: Image.Image) -> np.ndarray:
    return (np.asarray(picture).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)


def _mask(file: File, picture: Image.Image) -> tuple[Image.Image, list[str]]:
    """The mask in grey, of 0 and 255 only, and its flags."""
    if picture.mode == "L":
        values = np.asarray(picture)
    elif picture.mode == "1":
        values = np.asarray(picture.convert("L"))
    elif picture.mode.startswith("I"):
        values = _upper_byte(picture)
    else:
        # A lesion may be marked in colour, so its brightest channel counts.
        values = np.asarray(_rgb(picture)).max(axis=2)
    least, most = int(values.min()), int(values.max())
    black_and_white = (values + np.uint8(1)).max() <= 1  # 255 + 1 is 0
    flags = []
    if 0 < most <= codecs.FOREGROUND:
        detail = f"its values are {least} to {most}, none above {codecs.FOREGROUND}; lesion must be 255"
        raise BadPairError(file, "mask-values", detail)
    if most == 0 or least > codecs.FOREGROUND:
        flags.append("constant-mask")
    if not black_and_white and np.count_nonzero(np.bincount(values.ravel())) > 2:
        flags.append("grey-mask")
    if picture.mode == "L" and black_and_white:
        return picture, flags
    return Image.fromarray((values > codecs.FOREGROUND) * np.uint8(255)), flags


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
