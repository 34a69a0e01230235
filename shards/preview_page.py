"""Preview page: samples of a shard set as one HTML file, to filter by split and flag, with masks that toggle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from shards.data_uri import mask_uri, photo_uri
from shards.html_page import template_environment
from shards.preview import OUTLINE_COLOUR, choose_samples
from shards.reader import ShardSet, Split

SIDE = 320
"""Longer side of a picture in pixels."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One sample of the page."""

    key: str
    split: str
    flags: tuple[str, ...]
    """Flags of the sample, as `shards build` set them."""
    height: int
    """Of the original, in pixels."""
    width: int
    lesion_area: float
    """Share of the image that is lesion, 0 to 1."""
    photo: str
    """Data URI."""
    mask: str
    """Data URI of a transparent layer."""

    @classmethod
    def of(cls, split: Split, index: int) -> Self:
        """Read a sample and encode its pictures. Raises what `Split.read` raises."""
        mask, meta = split.mask(index), split.meta(index)
        return cls(
            key=split.key(index),
            split=split.name,
            flags=tuple(meta.get("flags", ())),
            height=meta["height"],
            width=meta["width"],
            lesion_area=float(mask.mean()),
            photo=photo_uri(split.image(index), SIDE),
            mask=mask_uri(mask > 0, OUTLINE_COLOUR, SIDE),
        )


def preview_page(root: str | Path, samples: int = 24) -> str:
    """Render a page of at most `samples` samples, those of `contact_sheet`; raises what that raises."""
    shard_set = ShardSet.open(root)
    tiles = [Tile.of(split, index) for split, index in choose_samples(shard_set, samples)]
    return (
        template_environment()
        .get_template("preview.html.j2")
        .render(
            name=Path(str(root)).name,
            index=shard_set.index,
            tiles=tiles,
            flags=sorted({flag for tile in tiles for flag in tile.flags}),
        )
    )
