"""Read pictures of 16 bits per channel at full depth, and reduce them to 8 bits by the range that they use.

Pillow has 16 bits for grey pictures only: of colour and of grey with alpha it keeps the upper bytes. A camera or a
microscope with 10, 12 or 14 bits stores its values as they are, so that the upper byte of the file is nearly black.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageFile

BIT_DEPTHS = (8, 10, 12, 14, 16)
"""Bits per channel of the devices whose pictures come in files of 16 bits."""
# Raw modes of Pillow's PNG decoder: for each that gives the upper bytes of samples, the one that gives the lower bytes.
_LOWER_BYTES = {"RGB;16B": "RGB;16L", "RGBA;16B": "RGBA;16L"}
_GREY_ALPHA, _GREY_ALPHA_BYTES = "LA;16B", "RGBA"  # two samples of two bytes are four channels of one


def wide_values(picture: Image.Image) -> np.ndarray | None:
    """Samples of a picture of 16 bits per channel, (H, W, C) uint16; None for 8 bits.

    The channels are those of the file: grey, grey and alpha, RGB, or RGB and alpha. A colour picture must not have been
    loaded, for Pillow drops the lower bytes then.
    """
    if picture.mode.startswith("I"):
        return np.asarray(picture).clip(0, 0xFFFF).astype(np.uint16)[..., None]
    if not isinstance(picture, ImageFile.ImageFile) or not picture.tile:
        return None
    raw_mode = picture.tile[0].args
    if raw_mode == _GREY_ALPHA:
        return _decode_as(picture, _GREY_ALPHA_BYTES).view(">u2").astype(np.uint16)
    if raw_mode not in _LOWER_BYTES:
        return None
    upper, lower = (_decode_as(picture, mode) for mode in (raw_mode, _LOWER_BYTES[raw_mode]))
    return upper.astype(np.uint16) << 8 | lower


def split_alpha(values: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Split samples (H, W, C) of 1 to 4 channels into colours (H, W, 1 or 3) and alpha (H, W), where there is one."""
    if values.shape[2] % 2:
        return values, None
    return values[..., :-1], values[..., -1]


def excess_bits(values: np.ndarray) -> int:
    """Bits beyond 8 of the least of `BIT_DEPTHS` that can hold the highest of the samples."""
    highest = int(values.max())
    return next(bits for bits in BIT_DEPTHS if highest < 1 << bits) - 8


def reduce_to_8_bits(values: np.ndarray) -> np.ndarray:
    """Reduce samples to uint8: drop their `excess_bits`."""
    return values if values.dtype == np.uint8 else (values >> excess_bits(values)).astype(np.uint8)


def _decode_as(picture: ImageFile.ImageFile, raw_mode: str) -> np.ndarray:
    """Decode the file of a picture that is not loaded, with another raw mode; the picture stays as it is."""
    file = picture.fp
    assert file is not None
    position = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(position)
    with Image.open(io.BytesIO(data), formats=["PNG"]) as again:
        assert isinstance(again, ImageFile.ImageFile)
        again.tile = [tile._replace(args=raw_mode) for tile in again.tile]
        return np.asarray(again)
