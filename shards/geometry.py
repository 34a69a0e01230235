"""Resize images and masks to the square input of the network, and predictions back; outline masks.

A `ResizePlan` maps the source box, a region of the original, to the target box, the region of the square it fills:

    mode      source box                  target box
    stretch   the whole original          the whole square; the aspect ratio changes
    pad       the whole original          its aspect ratio, centred; black around it
    crop      the centred square          the whole square
    original  the whole original          the same: nothing is resized
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
from PIL import Image, ImageFilter

ResizeMode = Literal["stretch", "pad", "crop"]
RESIZE_MODES: tuple[str, ...] = get_args(ResizeMode)

Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels; right and bottom excluded."""


@dataclass(frozen=True, kw_only=True)
class ResizePlan:
    """The geometry of one resize, from an original to the network's input."""

    mode: str
    """stretch, pad, crop or original."""
    original: tuple[int, int]
    """(height, width) of the original in pixels."""
    size: tuple[int, int]
    """(height, width) of the resized image in pixels."""
    source: Box
    """Source box: the region of the original that is used, in its pixels."""
    target: Box
    """Target box: the region of the resized image that it fills, in its pixels."""

    @classmethod
    def of(cls, mode: str, height: int, width: int, side: int | None) -> Self:
        """Plan the resize of an original of `height` × `width` pixels to a square of `side` pixels (None: unchanged).

        Raises ValueError for a `mode` that is not in RESIZE_MODES.
        """
        whole = (0, 0, width, height)
        if side is None:
            size = (height, width)
            return cls(mode="original", original=size, size=size, source=whole, target=whole)
        source, target = whole, (0, 0, side, side)
        if mode == "pad":
            scale = side / max(height, width)
            w, h = max(1, round(width * scale)), max(1, round(height * scale))
            left, top = (side - w) // 2, (side - h) // 2
            target = (left, top, left + w, top + h)
        elif mode == "crop":
            edge = min(height, width)
            left, top = (width - edge) // 2, (height - edge) // 2
            source = (left, top, left + edge, top + edge)
        elif mode != "stretch":
            raise ValueError(f"fit {mode!r} is none of {', '.join(RESIZE_MODES)}")
        return cls(mode=mode, original=(height, width), size=(side, side), source=source, target=target)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Parse a plan from a sample's JSON."""
        return cls(
            mode=value["kind"],
            original=tuple(value["original"]),
            size=tuple(value["size"]),
            source=tuple(value["source"]),
            target=tuple(value["target"]),
        )

    def to_json(self) -> dict[str, Any]:
        """Give the plan as plain lists, for a sample's JSON."""
        return {
            "kind": self.mode,
            "original": list(self.original),
            "size": list(self.size),
            "source": list(self.source),
            "target": list(self.target),
        }

    @property
    def aspect_ratio(self) -> float:
        """Width over height at which the resized image looks as it was taken: a stretched one at its original's."""
        height, width = self.original if self.mode == "stretch" else self.size
        return width / height

    def resize_image(self, picture: Image.Image) -> np.ndarray:
        """Resize an original RGB picture to (H, W, 3) uint8: bilinear with antialiasing, black outside the target box.

        The picture may be the original reduced to some eighths, as a JPEG decoder can do.
        """
        return self.pad_to_square(np.asarray(self.resize_content(picture)))

    def resize_mask(self, mask: np.ndarray) -> np.ndarray:
        """Resize an original mask (H, W) uint8, 0 and 1 or 0 and 255, to 0 and 1: foreground if half of the area is."""
        grey = mask if mask.max() > 1 else mask.astype(np.uint8, copy=False) * np.uint8(255)
        area = self._resized(Image.fromarray(grey), Image.Resampling.BOX, self.source, self.target)
        return self.pad_to_square((np.asarray(area) > 127).view(np.uint8))

    def resize_content(self, picture: Image.Image) -> Image.Image:
        """Resize the source box of an original RGB picture to the size of the target box, without padding."""
        # The last row and column of a scaled picture may stand for a part of a pixel: its size is rounded up.
        scale = round(8 * max(picture.size) / max(self.original)) / 8
        left, top, right, bottom = self.source
        source = self.source if scale == 1 else (left * scale, top * scale, right * scale, bottom * scale)
        # Not BOX: it weighs whole pixels only, and a reduced picture would differ more from the full one.
        return self._resized(picture, Image.Resampling.BILINEAR, source, self.target)

    def pad_to_square(self, content: np.ndarray) -> np.ndarray:
        """Put content (h, w) or (h, w, C) uint8 of the target box into the square (H, W); 0 outside."""
        left, top, right, bottom = self.target
        if (bottom - top, right - left) == self.size:
            return content
        out = np.zeros(self.size + content.shape[2:], dtype=np.uint8)
        out[top:bottom, left:right] = content
        return out

    def restore(self, probs: np.ndarray) -> np.ndarray:
        """Resize probs (H, W) float32 in [0, 1] to the original's resolution, bilinear; 0 outside the source box."""
        left, top, right, bottom = self.target
        # Cut out first: the resampling looks beyond a box, at the black border of `pad`.
        picture = Image.fromarray(np.ascontiguousarray(probs[top:bottom, left:right], dtype=np.float32))
        whole = (0.0, 0.0, right - left, bottom - top)
        restored = np.asarray(self._resized(picture, Image.Resampling.BILINEAR, whole, self.source))
        out = np.zeros(self.original, dtype=np.float32)
        left, top, right, bottom = self.source
        out[top:bottom, left:right] = restored
        return out

    @staticmethod
    def _resized(
        picture: Image.Image, method: Image.Resampling, source: tuple[float, float, float, float], target: Box
    ) -> Image.Image:
        """Resize the box `source` of a picture to the size of the box `target`."""
        size = (target[2] - target[0], target[3] - target[1])
        if size == (source[2] - source[0], source[3] - source[1]):
            return picture.crop((int(source[0]), int(source[1]), int(source[2]), int(source[3])))
        if size[0] > source[2] - source[0] or size[1] > source[3] - source[1]:
            method = Image.Resampling.BILINEAR  # BOX would only repeat pixels
        return picture.resize(size, method, box=source, reducing_gap=None)


def draw_outline(picture: np.ndarray, mask: np.ndarray, colour: str, width: int) -> None:
    """Draw the outline of `mask` (H, W) bool into `picture` (H, W, 3) uint8 RGB, as #rrggbb and so many pixels wide."""
    picture[mask_outline(mask, width)] = tuple(bytes.fromhex(colour.removeprefix("#")))


def mask_outline(mask: np.ndarray, width: int) -> np.ndarray:
    """Find the pixels of `mask` (H, W) bool within `width` pixels of its boundary, (H, W) bool.

    The border of the image bounds the mask too. A box blur is below 255 exactly where background lies within its
    radius (a single such pixel may be rounded away), in a hundredth of the time of Pillow's erosion.
    """
    grey = Image.fromarray(np.pad(mask, width).view(np.uint8) * np.uint8(255))
    blurred = np.asarray(grey.filter(ImageFilter.BoxBlur(width)))[width:-width, width:-width]
    return mask & (blurred < 255)
