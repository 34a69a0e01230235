"""Encode one pair into a sample: decode, check, resize, compress, and hash the image.

With `--size original` a pair is copied instead, if it can be: its headers are checked, and nothing is decoded. A pair
in folders is only probed; its bytes are copied when its shard is written (`DeferredCopy`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shards import codecs, format
from shards.geometry import ResizePlan
from shards.inputs.decode import BadPairError, RawPair, load_pair, probe_raw_pair, read_raw_pair
from shards.inputs.headers import ends_of
from shards.inputs.match import Pair, Rejected
from shards.inputs.source import FolderSource, Source
from shards.planning.duplicates import bytes_hash, perceptual_hash
from shards.planning.plan import BuildOptions


@dataclass(frozen=True, kw_only=True)
class Sample:
    """An encoded sample: the bytes of its members, and its row of the sample table."""

    key: str
    members: list[bytes]
    """Bytes of the members in the order of `format.MEMBERS`; an absent one is empty."""
    original: tuple[int, int]
    """Height and width of the original in pixels."""
    foreground: int
    """Number of mask pixels that are 1, or `format.UNCOUNTED`."""
    flags: list[str]
    hash: bytes
    """Hash of the image, 32 bytes (`shards.planning.duplicates`)."""


@dataclass(frozen=True, kw_only=True)
class DeferredCopy:
    """A pair not read in full yet: its bytes are copied from the source when its shard is written."""

    key: str
    original: tuple[int, int]
    """Height and width of the original in pixels."""
    hash: bytes
    """Hash of the image's size and ends, 32 bytes (`shards.planning.duplicates.bytes_hash`)."""


def encode(
    pair: Pair, group: str, sources: list[Source], options: BuildOptions, *, keep_original: bool
) -> Sample | DeferredCopy | list[Rejected]:
    """Encode or copy a pair, or defer its copy; the rejected files where it is bad.

    `keep_original` adds the mask at its original resolution.
    """
    try:
        if options.size is None:
            copy = _copy_undecoded(pair, group, sources, keep_original=keep_original)
            if copy is not None:
                return copy
        decoded = load_pair(pair, sources, options.fit, options.size)
    except BadPairError as error:
        return error.rejected(pair)
    plan = decoded.resize_plan
    mask = plan.resize_mask(decoded.mask)
    jpeg = decoded.jpeg if plan.mode == "original" else None
    content = decoded.picture if jpeg else plan.resize_content(decoded.picture)
    members = [
        jpeg or codecs.encode_image(plan.pad_to_square(np.asarray(content))),
        _metadata(pair, group, plan, decoded.flags),
        codecs.encode_mask(mask),
        codecs.encode_mask(np.asarray(decoded.mask)) if keep_original else b"",
    ]
    return Sample(
        key=pair.key,
        members=members,
        original=plan.original,
        foreground=int(mask.sum()),
        flags=decoded.flags,
        hash=perceptual_hash(content),
    )


def copy_deferred(
    pair: Pair, group: str, size: tuple[int, int], sources: list[Source], *, keep_original: bool
) -> list[bytes] | None:
    """Read the members of a pair whose copy was deferred; `size` is its (height, width) in pixels.

    None when one of its files has another size now, in bytes or pixels, or cannot be copied. Raises BadPairError.
    """
    raw = read_raw_pair(pair, sources)
    if raw is None or raw.resize_plan.original != size:
        return None
    if (len(raw.jpeg), len(raw.png)) != (pair.image.size, pair.mask.size):
        return None
    return _raw_members(pair, group, raw, keep_original=keep_original)


def _copy_undecoded(
    pair: Pair, group: str, sources: list[Source], *, keep_original: bool
) -> Sample | DeferredCopy | None:
    """Copy a pair, or from folders defer its copy; None when it has to be decoded. Raises BadPairError."""
    images, masks = (sources[file.source] for file in (pair.image, pair.mask))
    if isinstance(images, FolderSource) and isinstance(masks, FolderSource):
        probed = probe_raw_pair(pair, images, sources)
        if probed is None:
            return None
        plan, ends = probed
        return DeferredCopy(key=pair.key, original=plan.original, hash=bytes_hash(pair.image.size, ends))
    raw = read_raw_pair(pair, sources)
    if raw is None:
        return None
    return Sample(
        key=pair.key,
        members=_raw_members(pair, group, raw, keep_original=keep_original),
        original=raw.resize_plan.original,
        foreground=format.UNCOUNTED,
        flags=[format.COPIED],
        hash=bytes_hash(len(raw.jpeg), ends_of(raw.jpeg)),
    )


def _raw_members(pair: Pair, group: str, raw: RawPair, *, keep_original: bool) -> list[bytes]:
    metadata = _metadata(pair, group, raw.resize_plan, [format.COPIED])
    return [raw.jpeg, metadata, raw.png, raw.png if keep_original else b""]


def _metadata(pair: Pair, group: str, plan: ResizePlan, flags: list[str]) -> bytes:
    """The sample's JSON."""
    return format.canonical_json(
        {
            "key": pair.key,
            "height": plan.original[0],
            "width": plan.original[1],
            "image": pair.image.name,
            "mask": pair.mask.name,
            "group": group,
            "fit": plan.to_json(),
            "flags": flags,
        }
    )
