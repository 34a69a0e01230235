"""How an image is fitted to the square the network sees, and how a prediction goes back to the original.

A `ResizePlan` is four numbers of geometry: the box of the original that is shown, and the box of the square it fills.
`stretch` shows all of the original on all of the square; `pad` shows all of it, centred, in its own shape;
`crop` shows the centred square of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
from PIL import Image

ResizeMode = Literal["stretch", "pad", "crop"]
RESIZE_MODES: tuple[str, ...] = get_args(ResizeMode)

Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels; right and bottom excluded."""


@dataclass(frozen=True, kw_only=True)
class ResizePlan:
    """Where the pixels of one original came to lie."""

    mode: str
    """stretch, pad, crop, or original (nothing was done)."""
    original: tuple[int, int]
    """(height, width) of the original in pixels."""
    size: tuple[int, int]
    """(height, width) of what the network sees, in pixels."""
    source: Box
    """The part of the original that is shown."""
    target: Box
    """The part of the fitted image that it fills."""

    @classmethod
    def of(cls, mode: str, height: int, width: int, side: int | None) -> Self:
        """The fit of an original of `height` × `width` into a square of `side` pixels (None: left as it is)."""
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
        """The fit that `to_json` described."""
        return cls(
            mode=value["kind"],
            original=tuple(value["original"]),
            size=tuple(value["size"]),
            source=tuple(value["source"]),
            target=tuple(value["target"]),
        )

    def to_json(self) -> dict[str, Any]:
        """As plain lists, for a sample's JSON."""
        return {
            "kind": self.mode,
            "original": list(self.original),
            "size": list(self.size),
            "source": list(self.source),
            "target": list(self.target),
        }

    def resize_image(self, picture: Image.Image) -> np.ndarray:
        """The fitted image (H, W, 3) uint8 of an original RGB picture; antialiased, black beside it.

        The picture may be the original at a scale of some eighths, as a JPEG decoder can give it.
        """
        return self.pad_to_square(np.asarray(self.resize_content(picture)))

    def resize_mask(self, mask: np.ndarray | Image.Image) -> np.ndarray:
        """The fitted mask (H, W) uint8 0/1: foreground where half of the area is.

        `mask` is the original one: an array of 0 and 1, or a grey picture of 0 and 255.
        """
        if isinstance(mask, np.ndarray):
            mask = Image.fromarray(mask.astype(np.uint8, copy=False) * np.uint8(255))
        area = self._resized(mask, Image.Resampling.BOX, self.source, self.target)
        return self.pad_to_square((np.asarray(area) > 127).view(np.uint8))

    def resize_content(self, picture: Image.Image) -> Image.Image:
        """The part of an original RGB picture that is shown, at the size at which it is; as `resize_image` takes it."""
        # The last row and column of a scaled picture may stand for a part of a pixel: its size is rounded up.
        scale = round(8 * max(picture.size) / max(self.original)) / 8
        left, top, right, bottom = self.source
        source = self.source if scale == 1 else (left * scale, top * scale, right * scale, bottom * scale)
        # Not a box: that takes or leaves whole pixels, and what a scaled picture gave would be further from the full.
        return self._resized(picture, Image.Resampling.BILINEAR, source, self.target)

    def pad_to_square(self, content: np.ndarray) -> np.ndarray:
        """What is shown, (h, w) or (h, w, C) uint8, on the square (H, W); 0 beside it."""
        left, top, right, bottom = self.target
        if (bottom - top, right - left) == self.size:
            return content
        out = np.zeros(self.size + content.shape[2:], dtype=np.uint8)
        out[top:bottom, left:right] = content
        return out

    def restore(self, probs: np.ndarray) -> np.ndarray:
        """Bring probs (H, W) float32 back to the original's resolution, bilinear; 0 where nothing was shown."""
        picture = Image.fromarray(np.ascontiguousarray(probs, dtype=np.float32))
        back = np.asarray(self._resized(picture, Image.Resampling.BILINEAR, self.target, self.source))
        out = np.zeros(self.original, dtype=np.float32)
        left, top, right, bottom = self.source
        out[top:bottom, left:right] = back
        return out

    @staticmethod
    def _resized(
        picture: Image.Image, method: Image.Resampling, source: tuple[float, float, float, float], target: Box
    ) -> Image.Image:
        size = (target[2] - target[0], target[3] - target[1])
        if size == (source[2] - source[0], source[3] - source[1]):
            return picture.crop((int(source[0]), int(source[1]), int(source[2]), int(source[3])))
        if size[0] > source[2] - source[0] or size[1] > source[3] - source[1]:
            method = Image.Resampling.BILINEAR  # a box would only repeat pixels
        return picture.resize(size, method, box=source, reducing_gap=None)
