"""Encode a pair: decode and check it once, and make from that the members of its sample and its perceptual hash.

Where the originals are kept, a pair is copied instead, if it can be: its headers are checked, and nothing is decoded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shards import format
from shards.duplicates import bytes_hash, perceptual_hash
from shards.geometry import Fit
from shards.pair import BadPairError, as_it_is, load, read
from shards.pairing import Pair, Rejected
from shards.plan import BuildOptions
from shards.source import Source


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample as it goes into a shard."""

    key: str
    members: list[bytes]
    """As in `format.MEMBERS`; an absent one is empty."""
    original: tuple[int, int]
    """Height and width of the original in pixels."""
    foreground: int
    """Mask pixels that are 1, or `format.UNCOUNTED`."""
    flags: list[str]
    hash: bytes
    """Of the image (`shards.duplicates`)."""


def encode(
    pair: Pair, group: str, sources: list[Source], options: BuildOptions, *, original: bool
) -> Sample | list[Rejected]:
    """Copy a pair, or decode, fit and encode it, with the original mask where asked; or say what is bad."""
    try:
        whole = as_it_is(pair, sources) if options.size is None else None
        if whole:
            return Sample(
                key=pair.key,
                members=_copied(pair, group, whole.jpeg, whole.png, whole.fit, original=original),
                original=whole.fit.original,
                foreground=format.UNCOUNTED,
                flags=[format.COPIED],
                hash=bytes_hash(whole.jpeg),
            )
        decoded = load(pair, sources, options.fit, options.size)
    except BadPairError as error:
        return error.rejected(pair)
    fit = decoded.fit
    mask = fit.mask(decoded.mask)
    jpeg = decoded.jpeg if fit.kind == "original" else None
    shown = decoded.picture if jpeg else fit.shown(decoded.picture)
    members = [
        jpeg or format.encode_image(fit.place(np.asarray(shown))),
        _meta(pair, group, fit, decoded.flags),
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


def copy_again(pair: Pair, group: str, sources: list[Source], size: tuple[int, int], *, original: bool) -> list[bytes]:
    """The members of a pair that `encode` has copied, read once more; `size` is its (height, width) in pixels.

    Whether the files have changed since is not looked at. Raises BadPairError when they cannot be read.
    """
    return _copied(pair, group, *read(pair, sources), Fit.plan("original", *size, None), original=original)


def _copied(pair: Pair, group: str, jpeg: bytes, png: bytes, fit: Fit, *, original: bool) -> list[bytes]:
    return [jpeg, _meta(pair, group, fit, [format.COPIED]), png, png if original else b""]


def _meta(pair: Pair, group: str, fit: Fit, flags: list[str]) -> bytes:
    """The sample's JSON."""
    return format.canonical_json(
        {
            "key": pair.key,
            "height": fit.original[0],
            "width": fit.original[1],
            "image": pair.image.name,
            "mask": pair.mask.name,
            "group": group,
            "fit": fit.to_json(),
            "flags": flags,
        }
    )
