"""Contact sheet: samples of every split with the outlines of their masks, captioned with key and split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from shards.errors import ShardSetError, UsageError
from shards.files import atomic_file
from shards.format import REJECTED_NAME
from shards.geometry import ResizePlan, draw_outline
from shards.reader import ShardSet, Split

TILE = 192  # pixels: side of each image on the sheet
CAPTION = 34  # pixels: two lines of text below it
GAP = 8  # pixels
COLUMNS = 6
OUTLINE_COLOUR = "#00ff78"
OUTLINE_WIDTH = 2  # pixels
MAX_KEY_LETTERS = 24  # that fit below a tile


def contact_sheet(root: str | Path, samples: int = 24) -> Image.Image:
    """Draw at most `samples` images, shared evenly between the splits and spread over each of them.

    Raises UsageError for `samples` below 1, ShardSetError for a set without samples, and what `ShardSet.open` and
    `Split.read` raise.
    """
    chosen = choose_samples(ShardSet.open(root), samples)
    columns = min(COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    sheet = Image.new("RGB", (GAP + columns * (TILE + GAP), GAP + rows * (TILE + CAPTION + GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for position, (split, index) in enumerate(chosen):
        x, y = GAP + position % columns * (TILE + GAP), GAP + position // columns * (TILE + CAPTION + GAP)
        mask = split.mask(index)
        sheet.paste(tile(split.image(index), mask), (x, y))
        draw.text((x, y + TILE + 2), _shortened(split.key(index)), fill="black", font=font)
        draw.text((x, y + TILE + 17), f"{split.name} · lesion {mask.mean():.0%}", fill="dimgray", font=font)
    return sheet


def choose_samples(shard_set: ShardSet, samples: int) -> list[tuple[Split, int]]:
    """Choose at most `samples` samples, as (split, index), shared evenly between the splits and spread over each.

    Raises UsageError for `samples` below 1, ShardSetError for a set without samples.
    """
    if samples < 1:
        raise UsageError(f"--samples {samples}: give 1 or more")
    splits = [split for split in map(shard_set.split, shard_set.index.splits) if len(split)]
    chosen: list[tuple[Split, int]] = []
    for position, split in enumerate(splits):
        share = (samples - len(chosen)) // (len(splits) - position)
        indices = np.linspace(0, len(split) - 1, min(share, len(split))).astype(int)
        chosen += [(split, int(index)) for index in indices]
    if not chosen:
        where = shard_set.location
        raise ShardSetError(f"{where}: no sample is in it; see {REJECTED_NAME} there for what was left out")
    return chosen


def tile(image: np.ndarray, mask: np.ndarray) -> Image.Image:
    """Draw an image (H, W, 3) uint8 with the outline of its mask (H, W), padded to a square of TILE pixels."""
    plan = ResizePlan.of("pad", mask.shape[0], mask.shape[1], TILE)
    pixels = plan.resize_image(Image.fromarray(image)).copy()
    draw_outline(pixels, plan.resize_mask(mask) > 0, OUTLINE_COLOUR, OUTLINE_WIDTH)
    return Image.fromarray(pixels)


def save(sheet: Image.Image, path: str | Path) -> None:
    """Write the sheet as PNG, atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        sheet.save(temporary, "PNG")


def _shortened(key: str) -> str:
    return key if len(key) <= MAX_KEY_LETTERS else f"{key[:11]}…{key[-12:]}"
