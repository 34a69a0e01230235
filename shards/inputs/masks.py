"""Decide what a mask marks as lesion, on its values at full depth, or refuse it in words.

A pixel is lesion when its value is above 128 of 255, as for the official scorer. Values of more than 8 bits are first
reduced by the bit depth of the highest of them (`shards.inputs.depth`), so 0 and 255, 0 and 4095, 0 and 65535 in 16
bits are all masks. Palettes are looked up, and of a colour its brightest channel counts. A mask drawn in the alpha
channel alone, whose colour is the same everywhere, is read from there: what is opaque is lesion.

A mask that can be read in more than one way is refused (`MaskValueError`):
- marks, none of them above 128 (0 and 1): nobody knows which of them the scorer would count
- several values, all of them above 128: no background
- a label map: few distinct values, most of the marked pixels at or below 128 (0, 1 and an ignore rim of 255)
- few colours, two of them bright: several classes
- marks in pixels that are fully transparent
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from PIL import Image

from shards.codecs import FOREGROUND
from shards.inputs.depth import excess_bits, reduce_to_8_bits, split_alpha, wide_values

MAX_LABELS = 32  # distinct values of a label map; a resized or compressed mask has more
LOW_LABEL = 16  # at most: the values of 8 bits that number classes, and that hardly occur in a resized mask
LOW_LABEL_SHARE = 0.05  # of the marked pixels
BRIGHT_DISTANCE = 64  # of 255, in one channel: two bright colours that differ more are two classes

MaskKind = Literal["", "empty", "full", "inverted"]
"""Notable kind of a mask: no lesion, nothing else, or (inverted) lesion on most of the picture's border."""


class MaskValueError(Exception):
    """Mask whose values can be read in more than one way; the text says why, and what to do."""


def read_mask(picture: Image.Image, binary: np.ndarray | None = None) -> tuple[np.ndarray, list[str]]:
    """Decode a mask of any mode to (H, W) uint8, 255 where the lesion is, else 0; and its flags.

    `binary`: the picture as (H, W) uint8, where it is known to be of 0 and 255 only. The flags are constant-mask (all
    lesion or none) and grey-mask (values between black and white). Raises MaskValueError when it is ambiguous, and
    what Pillow raises for damaged bytes.
    """
    if binary is not None:
        return binary, ["constant-mask"] if binary.min() == binary.max() else []
    grey = picture.mode in ("1", "L")
    values = np.asarray(picture.convert("L")) if grey else _marks(*_colours_and_alpha(picture))  # (H, W)
    levels = reduce_to_8_bits(values)
    low, high = int(levels.min()), int(levels.max())
    black_and_white = (levels + np.uint8(1)).max() <= 1  # 255 + 1 is 0
    flags = ["constant-mask"] if high == 0 or low > FOREGROUND else []
    if values is not levels or not black_and_white:  # else there are no other values
        _check_values(values, levels, lossy=picture.format == "JPEG")
    if black_and_white:
        return levels, flags
    if np.count_nonzero(np.bincount(levels.ravel())) > 2:
        flags.append("grey-mask")
    return (levels > FOREGROUND) * np.uint8(255), flags


def kind_of_mask(mask: np.ndarray) -> MaskKind:
    """Classify a mask (H, W), non-zero where the lesion is."""
    if not mask.any():
        return "empty"
    if mask.all():
        return "full"
    border = np.concatenate([mask[0], mask[-1], mask[1:-1, 0], mask[1:-1, -1]])
    return "inverted" if 2 * np.count_nonzero(border) > len(border) else ""


def _colours_and_alpha(picture: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    """Colours (H, W, C) at full depth, and alpha (H, W) where it is not the same everywhere."""
    samples = wide_values(picture)
    if samples is None:
        if picture.mode in ("P", "PA"):
            picture = picture.convert("RGBA")
        elif picture.mode not in ("LA", "RGB", "RGBA"):
            picture = picture.convert("RGB")
        samples = np.asarray(picture)
    colours, alpha = split_alpha(samples)
    return colours, None if alpha is None or (alpha == alpha[0, 0]).all() else alpha


def _marks(colours: np.ndarray, alpha: np.ndarray | None) -> np.ndarray:
    """Reduce colours (H, W, C) and alpha to the one channel (H, W) that the mask is drawn in. Raises MaskValueError."""
    if alpha is not None and (colours == colours[0, 0]).all():
        return alpha
    brightest = colours.max(axis=2)
    bright = reduce_to_8_bits(brightest) > FOREGROUND
    if alpha is not None and (alpha[bright] == 0).any():
        raise MaskValueError(
            "it marks pixels that are fully transparent, so its colours and its alpha channel differ; "
            "save it as black and white without transparency"
        )
    if (colours[..., :1] != colours).any():
        _check_colours(colours[bright])
    return brightest


def _check_colours(bright: np.ndarray) -> None:
    """Raise MaskValueError when the bright pixels (n, C) of a mask have few colours that differ widely."""
    if not len(bright) or not (np.ptp(reduce_to_8_bits(bright), axis=0) >= BRIGHT_DISTANCE).any():
        return
    packed = bright.astype(np.uint64) @ np.array([1 << 32, 1 << 16, 1], np.uint64)
    number = len(np.unique(packed))
    if number <= MAX_LABELS:
        raise MaskValueError(
            f"it has {number} bright colours, and which of them is the lesion cannot be told; "
            "make the lesion white and all else black"
        )


def _check_values(values: np.ndarray, levels: np.ndarray, *, lossy: bool) -> None:
    """Raise MaskValueError for ambiguous values (H, W), `levels` when reduced to 8 bits; `lossy`: JPEG adds noise."""
    low, high = int(values.min()), int(values.max())
    lowest, highest = int(levels.min()), int(levels.max())
    if high > 0 and highest <= FOREGROUND:
        reduced = "" if values is levels or high == highest else f" (when {high} is taken as {highest} of 255)"
        raise MaskValueError(
            f"its values are {low} to {high}, none above {FOREGROUND}{reduced}; "
            "lesion must be 255: multiply the values of the lesion"
        )
    if lowest > FOREGROUND and low < high and (not lossy or highest - lowest >= BRIGHT_DISTANCE):
        raise MaskValueError(
            f"its values are {low} to {high}, all above {FOREGROUND}; background must be 0 and lesion 255"
        )
    if lossy:
        return
    counts = np.bincount(values.ravel())
    distinct = np.flatnonzero(counts)
    if len(distinct) > MAX_LABELS:
        return
    marks = distinct[1:]  # the lowest value is the background
    marked = counts[marks].sum()
    mark_levels = marks >> excess_bits(values)
    low_marks = counts[marks[mark_levels <= FOREGROUND]].sum()
    labels = counts[marks[mark_levels <= LOW_LABEL]].sum()
    if 2 * low_marks > marked or labels > LOW_LABEL_SHARE * marked:
        listed = ", ".join(map(str, distinct[:6].tolist())) + (", ..." if len(distinct) > 6 else "")
        raise MaskValueError(
            f"it looks like a label map: its values are {listed}, and {low_marks / marked:.0%} of the marked pixels "
            f"are at or below {FOREGROUND}; make the lesion 255 and all else 0"
        )
