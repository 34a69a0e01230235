"""Encode a pair: decode and check it once, and make from that the members of its sample and its perceptual hash."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shards import format
from shards.duplicates import perceptual_hash
from shards.pair import BadPairError, load
from shards.plan import BuildOptions
from shards.source import Pair, Rejected, Source


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample as it goes into a shard."""

    key: str
    members: list[bytes]
    """As in `format.MEMBERS`; an absent one is empty."""
    original: tuple[int, int]
    """Height and width of the original in pixels."""
    foreground: int
    """Mask pixels that are 1."""
    flags: list[str]
    hash: bytes
    """Of the image (`shards.duplicates`)."""


def encode(
    pair: Pair, group: str, sources: list[Source], options: BuildOptions, *, original: bool
) -> Sample | list[Rejected]:
    """Decode, fit and encode a pair, with its mask at the original resolution where asked; or say what is bad."""
    try:
        decoded = load(pair, sources, options.fit, options.size)
    except BadPairError as error:
        return error.rejected(pair)
    fit = decoded.fit
    mask = fit.mask(decoded.mask)
    copied = decoded.jpeg if fit.kind == "original" else None
    shown = decoded.picture if copied else fit.shown(decoded.picture)
    meta = {
        "key": pair.key,
        "height": fit.original[0],
        "width": fit.original[1],
        "image": pair.image.name,
        "mask": pair.mask.name,
        "group": group,
        "fit": fit.to_json(),
        "flags": decoded.flags,
    }
    members = [
        copied or format.encode_image(fit.place(np.asarray(shown))),
        format.canonical_json(meta),
        format.encode_mask(mask),
        format.encode_mask(np.asarray(decoded.mask)) if original else b"",
    ]
    return Sample(
        key=pair.key,
        members=members,
        original=fit.original,
        foreground=int(mask.sum()),
        flags=decoded.flags,
        hash=perceptual_hash(shown),
    )
