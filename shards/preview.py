"""A contact sheet: samples of every split with the outline of their masks, captioned with key and split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from shards.errors import ShardSetError, UsageError
from shards.files import atomic_file
from shards.format import REJECTED_NAME
from shards.geometry import ResizePlan
from shards.reader import ShardSet, Split

TILE = 192  # pixels, each picture's side on the sheet
CAPTION = 34  # pixels, two lines of text below it
GAP = 8
COLUMNS = 6
OUTLINE = (0, 255, 120)


def contact_sheet(root: str | Path, samples: int = 24) -> Image.Image:
    """The sheet of `samples` pictures, shared evenly between the splits and spread over each of them.

    Raises ShardSetError for a set without samples.
    """
    if samples < 1:
        raise UsageError(f"--samples {samples}: give 1 or more")
    shard_set = ShardSet.open(root)
    splits = [split for split in map(shard_set.split, shard_set.index["splits"]) if len(split)]
    chosen: list[tuple[Split, int]] = []
    for place, split in enumerate(splits):
        share = (samples - len(chosen)) // (len(splits) - place)
        numbers = np.linspace(0, len(split) - 1, min(share, len(split))).astype(int)
        chosen += [(split, int(number)) for number in numbers]
    if not chosen:
        raise ShardSetError(f"{root}: no sample is in it; see {REJECTED_NAME} there for what was left out")
    columns = min(COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    sheet = Image.new("RGB", (GAP + columns * (TILE + GAP), GAP + rows * (TILE + CAPTION + GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for place, (split, number) in enumerate(chosen):
        x, y = GAP + place % columns * (TILE + GAP), GAP + place // columns * (TILE + CAPTION + GAP)
        sheet.paste(tile(split.image(number), split.mask(number)), (x, y))
        area = split.mask(number).mean()
        draw.text((x, y + TILE + 2), _shortened(split.key(number)), fill="black", font=font)
        draw.text((x, y + TILE + 17), f"{split.name} · lesion {area:.0%}", fill="dimgray", font=font)
    return sheet


def tile(image: np.ndarray, mask: np.ndarray) -> Image.Image:
    """A picture of an image (H, W, 3) with its mask (H, W) outlined, in its own shape on a square."""
    fit = ResizePlan.of("pad", mask.shape[0], mask.shape[1], TILE)
    pixels = fit.resize_image(Image.fromarray(image)).copy()
    pixels[outline(fit.resize_mask(mask))] = OUTLINE
    return Image.fromarray(pixels)


def outline(mask: np.ndarray) -> np.ndarray:
    """The pixels (H, W) bool on the edge of a mask, two pixels wide; the picture's border is no edge."""
    inner = mask.astype(bool)
    for _ in range(2):
        p = np.pad(inner, 1, mode="edge")
        inner = inner & p[:-2, 1:-1] & p[2:, 1:-1] & p[1:-1, :-2] & p[1:-1, 2:]
    return mask.astype(bool) & ~inner


def save(sheet: Image.Image, path: str | Path) -> None:
    """Write the sheet as PNG, under its name only when it is whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        sheet.save(temporary, "PNG")


def _shortened(key: str) -> str:
    return key if len(key) <= 24 else f"{key[:11]}…{key[-12:]}"
