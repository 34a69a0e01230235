"""Warn of a shard set whose masks look wrong as a whole: (nearly) all empty, all full, or inverted."""

from __future__ import annotations

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

    Areas are those of the sample table. Borders are looked at in SAMPLED_MASKS masks, spread over the split. Masks
    that were copied undecoded are not counted. Raises CorruptShardError for a mask that does not decode.
    """
    counted = np.flatnonzero(split.table["foreground"] != format.UNCOUNTED)
    if not len(counted):
        return []
    rows = split.table[counted]
    area = rows["height"].astype(np.int64) * rows["width"] if split.size is None else split.size**2
    warnings: list[str] = []
    if without_lesion(split):
        warnings.append(f"{split.name}: all {len(split)} masks are empty, so a Dice of it is no score")
    else:
        for name, found in (("empty", rows["foreground"] == 0), ("all lesion", rows["foreground"] == area)):
            number = int(np.count_nonzero(found))
            if number >= NEARLY_ALL * len(rows):
                warnings.append(f"{split.name}: {number} of {len(rows)} masks are {name}; look at them in a preview")
    sampled = counted[np.linspace(0, len(counted) - 1, min(SAMPLED_MASKS, len(counted))).astype(int)]
    inverted = sum(kind_of_mask(split.mask(index)) == "inverted" for index in sampled.tolist())
    if 2 * inverted > len(sampled):
        warnings.append(
            f"{split.name}: lesion covers most of the border in {inverted} of {len(sampled)} masks looked at; "
            "are they inverted (lesion 0, background 255)?"
        )
    return warnings


def without_lesion(split: Split) -> bool:
    """Tell whether every mask of a split is empty."""
    return bool((split.table["foreground"] == 0).all())
