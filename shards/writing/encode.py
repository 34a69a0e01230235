"""Encode a pair: decode and check it once, and make from that the members of its sample and its perceptual hash.

Where the originals are kept, a pair is copied instead, if it can be: its headers are checked, and nothing is decoded.
From a folder it is copied by its shard, and until then no more is read of its image than the two ends.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shards import codecs, format
from shards.geometry import ResizePlan
from shards.inputs.decode import BadPairError, RawPair, load, probe_raw_pair, read_raw_pair
from shards.inputs.headers import ends_of
from shards.inputs.match import Pair, Rejected
from shards.inputs.source import FolderSource, Source
from shards.planning.duplicates import bytes_hash, perceptual_hash
from shards.planning.plan import BuildOptions


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
    """Of the image (`shards.planning.duplicates`)."""


@dataclass(frozen=True, kw_only=True)
class Left:
    """A pair that is left where it is until its shard copies it."""

    key: str
    original: tuple[int, int]
    """Height and width in pixels."""
    hash: bytes
    """Of the image (`shards.planning.duplicates`)."""


def encode(
    pair: Pair, group: str, sources: list[Source], options: BuildOptions, *, original: bool
) -> Sample | Left | list[Rejected]:
    """Copy a pair or leave it, or decode, fit and encode it, with the original mask where asked; or say what is bad."""
    try:
        images, masks = (sources[file.source] for file in (pair.image, pair.mask))
        if options.size is None and isinstance(images, FolderSource) and isinstance(masks, FolderSource):
            found = probe_raw_pair(pair, images, sources)
            if found:
                fit, ends = found
                return Left(key=pair.key, original=fit.original, hash=bytes_hash(pair.image.size, ends))
        elif options.size is None:
            whole = read_raw_pair(pair, sources)
            if whole:
                return Sample(
                    key=pair.key,
                    members=_copied(pair, group, whole, original=original),
                    original=whole.fit.original,
                    foreground=format.UNCOUNTED,
                    flags=[format.COPIED],
                    hash=bytes_hash(len(whole.jpeg), ends_of(whole.jpeg)),
                )
        decoded = load(pair, sources, options.fit, options.size)
    except BadPairError as error:
        return error.rejected(pair)
    fit = decoded.fit
    mask = fit.resize_mask(decoded.mask)
    jpeg = decoded.jpeg if fit.mode == "original" else None
    shown = decoded.picture if jpeg else fit.resize_content(decoded.picture)
    members = [
        jpeg or codecs.encode_image(fit.pad_to_square(np.asarray(shown))),
        _meta(pair, group, fit, decoded.flags),
        codecs.encode_mask(mask),
        codecs.encode_mask(np.asarray(decoded.mask)) if original else b"",
    ]
    return Sample(
        key=pair.key,
        members=members,
        original=fit.original,
        foreground=int(mask.sum()),
        flags=decoded.flags,
        hash=perceptual_hash(shown),
    )


def copy_deferred(
    pair: Pair, group: str, size: tuple[int, int], sources: list[Source], *, original: bool
) -> list[bytes] | None:
    """The members of a pair that `encode` has left, read whole; `size` is its (height, width) in pixels.

    None when a file of it has another size now, in bytes or pixels, or cannot be copied. Raises BadPairError.
    """
    whole = read_raw_pair(pair, sources)
    if whole is None or whole.fit.original != size:
        return None
    if (len(whole.jpeg), len(whole.png)) != (pair.image.size, pair.mask.size):
        return None
    return _copied(pair, group, whole, original=original)


def _copied(pair: Pair, group: str, whole: RawPair, *, original: bool) -> list[bytes]:
    return [whole.jpeg, _meta(pair, group, whole.fit, [format.COPIED]), whole.png, whole.png if original else b""]


def _meta(pair: Pair, group: str, fit: ResizePlan, flags: list[str]) -> bytes:
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
