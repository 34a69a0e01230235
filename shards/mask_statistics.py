"""Warn of a shard set whose masks look wrong as a whole: (nearly) all empty, all full, or inverted."""

from __future__ import annotations

from collections import Counter

import numpy as np

from shards import format
from shards.inputs.masks import kind_of_mask
from shards.reader import Split

NEARLY_ALL = 0.95
"""Share of a split's masks from which on it is warned of."""
SAMPLED_MASKS = 64
"""Masks of a split that are decoded to look at their borders."""


def mask_warnings(split: Split) -> list[str]:
    """Describe what looks wrong about the masks of a split, a line each, with numbers; empty when nothing does.

    Borders are looked at in SAMPLED_MASKS masks, spread over the split, or over its first shard where shards have to be
    downloaded; so are areas where masks were copied, whose areas the sample table does not have. Raises
    CorruptShardError for a mask that does not decode.
    """
    if not len(split):
        return []
    sampled = sampled_masks(int(split.shard_samples[0]) if split.cached_set else len(split))
    kinds = Counter(kind_of_mask(split.mask(index)) for index in sampled)
    rows, total = split.table, len(split)
    if (rows["foreground"] == format.UNCOUNTED).any():
        empty, full, total = kinds["empty"], kinds["full"], len(sampled)
    else:
        area = rows["height"].astype(np.int64) * rows["width"] if split.size is None else split.size**2
        empty, full = (int(np.count_nonzero(rows["foreground"] == each)) for each in (0, area))
    warnings: list[str] = []
    if without_lesion(split):
        warnings.append(f"{split.name}: all {len(split)} masks are empty, so a Dice of it is no score")
    else:
        for name, number in (("empty", empty), ("all lesion", full)):
            if number >= NEARLY_ALL * total:
                warnings.append(f"{split.name}: {number} of {total} masks are {name}; look at them in a preview")
    inverted = kinds["inverted"]
    if 2 * inverted > len(sampled):
        warnings.append(
            f"{split.name}: lesion covers most of the border in {inverted} of {len(sampled)} masks looked at; "
            "are they inverted (lesion 0, background 255)?"
        )
    return warnings


def sampled_masks(count: int) -> list[int]:
    """Indices of the samples, of the first `count` of a split, whose masks are decoded: SAMPLED_MASKS, spread out."""
    return np.linspace(0, count - 1, min(SAMPLED_MASKS, count)).astype(int).tolist()


def without_lesion(split: Split) -> bool:
    """Tell whether every mask of a split is empty."""
    return bool((split.table["foreground"] == 0).all())
