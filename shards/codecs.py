"""Encode and decode the members of a sample: JPEG images and 1-bit PNG masks.

Time relative to Pillow's, on one core, for 512 × 512 pixels; the pixels are the same:

    decode_image   0.6   simplejpeg (libjpeg-turbo), which releases the GIL
    encode_mask    0.4   rows without a filter, as the PNG specification recommends for 1-bit images; smaller, too
    decode_mask    0.3   rows without a filter, inflated by isal; a PNG of another layout is decoded by Pillow

Other hand-written formats: `shards.layout` writes a tar header in 0.1 of tarfile's time, `shards.inputs.headers` reads
the size of an image from its header alone, and `shards.jpeg` repairs headers that TurboJPEG refuses.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import simplejpeg
from isal import isal_zlib

from shards.jpeg import decode_jpeg, jpeg_size

FOREGROUND = 128  # a mask value above it is lesion, as for the official scorer
JPEG_QUALITY = 95
MAX_PIXELS = 100_000_000  # of one image: the limit against decompression bombs
MAX_JPEG_SIDE = 65_500  # pixels that libjpeg writes
PNG_START = b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDR"  # followed by width, height, PNG_KIND and CRC-32
PNG_KIND = bytes((1, 0, 0, 0, 0))  # 1 bit, grey; deflate, filters by row, not interlaced
PNG_BODY = 41  # bytes before the body of IDAT if only IHDR comes before it


def encode_image(image: np.ndarray) -> bytes:
    """Encode an image (H, W, 3) uint8 RGB as JPEG."""
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(image), quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling="420"
    )


def decode_image(data: bytes | memoryview, out: np.ndarray | None = None) -> np.ndarray:
    """Decode a JPEG of `encode_image` or of the archives to (H, W, 3) uint8 RGB.

    `out`: decode into this contiguous array instead of a new one. Raises ValueError for bytes that are no JPEG, for
    another size than that of `out`, for damage (`shards.jpeg`), and for more than MAX_PIXELS.
    """
    if out is None:
        _check_pixels(*jpeg_size(data))
    return _check_shape(decode_jpeg(data, out), out)


def encode_mask(mask: np.ndarray) -> bytes:
    """Encode a mask (H, W), non-zero where the lesion is, as 1-bit greyscale PNG with unfiltered rows."""
    height, width = mask.shape
    rows = np.insert(np.packbits(mask.astype(bool), axis=1), 0, 0, axis=1)  # each row begins with filter type 0
    header = PNG_START[-4:] + struct.pack(">II", width, height) + PNG_KIND
    chunks = (header, b"IDAT" + zlib.compress(rows.tobytes(), 6), b"IEND")
    return PNG_START[:8] + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


def decode_mask(data: bytes | memoryview, out: np.ndarray | None = None) -> np.ndarray:
    """Decode a 1-bit or 8-bit greyscale PNG to a mask (H, W) uint8, 1 where the lesion is, into `out` if given.

    A PNG that `encode_mask` did not write is decoded by Pillow. The checksums of PNG's chunks are not verified, because
    the index has one for the whole member. Raises OSError, ValueError or SyntaxError (Pillow, for a broken chunk) for
    anything else, ValueError for another size than that of `out` and for more than MAX_PIXELS.
    """
    mask = _decode_unfiltered(data)
    if mask is None:
        from PIL import Image  # late: a loader of resized sets never needs its memory

        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            if picture.mode not in ("1", "L"):
                raise ValueError(f"a mask of mode {picture.mode}, not 1-bit or 8-bit grey")
            mask = np.array(picture, dtype=np.uint8)
            if picture.mode == "L":
                mask = (mask > FOREGROUND).view(np.uint8)
    if out is None:
        return mask
    out[:] = _check_shape(mask, out)
    return out


def _decode_unfiltered(data: bytes | memoryview) -> np.ndarray | None:
    """Decode a PNG of the layout of `encode_mask` to (H, W) uint8; None for any other layout."""
    if len(data) < PNG_BODY or data[:16] != PNG_START:
        return None
    width, height = struct.unpack(">II", data[16:24])
    _check_pixels(height, width)
    end = PNG_BODY + int.from_bytes(data[33:37], "big")
    if data[24:29] != PNG_KIND or data[37:PNG_BODY] != b"IDAT" or data[end + 8 : end + 12] != b"IEND":
        return None
    row = 1 + -(-width // 8)
    inflate = isal_zlib.decompressobj()
    try:
        rows = np.frombuffer(inflate.decompress(data[PNG_BODY:end], height * row + 1), np.uint8)
    except isal_zlib.error:  # pyright: ignore[reportGeneralTypeIssues]  its stub declares an instance
        return None
    if len(rows) != height * row or not inflate.eof or rows[::row].any():
        return None
    return np.unpackbits(rows.reshape(height, row)[:, 1:], axis=1, count=width)


def _check_pixels(height: int, width: int) -> None:
    """Raise ValueError for a decompression bomb."""
    if height * width > MAX_PIXELS:
        raise ValueError(f"{width} × {height} pixels, more than {MAX_PIXELS}")


def _check_shape(image: np.ndarray, out: np.ndarray | None) -> np.ndarray:
    """Give `image`. Raises ValueError if its shape is not that of `out`."""
    if out is not None and image.shape != out.shape:
        raise ValueError(f"{image.shape[1]} × {image.shape[0]} pixels, not {out.shape[1]} × {out.shape[0]}")
    return image
