"""Encode one pair into a sample: decode, check, resize, compress, and hash the image.

With `--size original` a pair is copied instead, if it can be: it is decoded as a check only. The bytes of a pair in
folders are copied when its shard is written (`DeferredCopy`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from isal import isal_zlib

from shards import codecs, format
from shards.geometry import ResizePlan
from shards.inputs.decode import BadPairError, load_pair, read_input, read_raw_pair
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
    has_lesion: bool
    """The mask is not empty."""
    flags: list[str]
    hash: bytes
    """Hash of the image (`shards.planning.duplicates`)."""
    is_bytes_hash: bool
    """The hash is that of the image's bytes, as of one that is copied."""


@dataclass(frozen=True, kw_only=True)
class DeferredCopy:
    """A checked pair whose bytes are copied from its sources when its shard is written."""

    key: str
    original: tuple[int, int]
    """Height and width of the original in pixels."""
    hash: bytes
    """Hash of the image's bytes (`shards.planning.duplicates.bytes_hash`)."""
    crcs: list[int]
    """CRC-32 of the image's and the mask's bytes."""
    has_lesion: bool
    """The mask is not empty."""


def encode(
    pair: Pair, sources: list[Source], options: BuildOptions, *, keep_original: bool
) -> Sample | DeferredCopy | list[Rejected]:
    """Encode or copy a pair, or defer its copy; the rejected files where it is bad.

    `keep_original` adds the mask at its original resolution.
    """
    try:
        if options.side is None:
            copy = _copy(pair, sources, keep_original=keep_original)
            if copy is not None:
                return copy
        decoded = load_pair(pair, sources, options.fit, options.side)
    except BadPairError as error:
        return error.rejected(pair)
    plan = decoded.resize_plan
    mask = plan.resize_mask(decoded.mask)
    jpeg = decoded.jpeg if plan.mode == "original" else None
    content = decoded.picture if jpeg else plan.resize_content(decoded.picture)
    members = [
        jpeg or codecs.encode_image(plan.pad_to_square(np.asarray(content))),
        _metadata(pair, plan, decoded.flags),
        codecs.encode_mask(mask),
        codecs.encode_mask(decoded.mask) if keep_original else b"",
    ]
    return Sample(
        key=pair.key,
        members=members,
        original=plan.original,
        foreground=int(mask.sum()),
        has_lesion=bool(mask.any()),
        flags=decoded.flags,
        hash=bytes_hash(len(jpeg), isal_zlib.crc32(jpeg)) if jpeg else perceptual_hash(content),
        is_bytes_hash=bool(jpeg),
    )


def copy_deferred(
    pair: Pair, size: tuple[int, int], crcs: list[int], sources: list[Source], *, keep_original: bool
) -> list[bytes] | None:
    """Read the members of a pair whose copy was deferred; `size` is its (height, width) in pixels.

    None when one of its files does not have the CRC-32 that was checked. Raises BadPairError.
    """
    jpeg, png = read_input(pair.image, sources), read_input(pair.mask, sources)
    if [isal_zlib.crc32(jpeg), isal_zlib.crc32(png)] != crcs:
        return None
    plan = ResizePlan.of("original", *size, None)
    return _raw_members(pair, jpeg, png, plan, keep_original=keep_original)


def _copy(pair: Pair, sources: list[Source], *, keep_original: bool) -> Sample | DeferredCopy | None:
    """Copy a pair, or from folders defer its copy; None when it has to be converted. Raises BadPairError."""
    raw = read_raw_pair(pair, sources)
    if raw is None:
        return None
    original, crcs = raw.resize_plan.original, [isal_zlib.crc32(raw.jpeg), isal_zlib.crc32(raw.png)]
    hash = bytes_hash(len(raw.jpeg), crcs[0])
    if all(isinstance(sources[file.source], FolderSource) for file in (pair.image, pair.mask)):
        return DeferredCopy(key=pair.key, original=original, hash=hash, crcs=crcs, has_lesion=raw.has_lesion)
    return Sample(
        key=pair.key,
        members=_raw_members(pair, raw.jpeg, raw.png, raw.resize_plan, keep_original=keep_original),
        original=original,
        foreground=format.UNCOUNTED,
        has_lesion=raw.has_lesion,
        flags=[format.COPIED],
        hash=hash,
        is_bytes_hash=True,
    )


def _raw_members(pair: Pair, jpeg: bytes, png: bytes, plan: ResizePlan, *, keep_original: bool) -> list[bytes]:
    return [jpeg, _metadata(pair, plan, [format.COPIED]), png, png if keep_original else b""]


def _metadata(pair: Pair, plan: ResizePlan, flags: list[str]) -> bytes:
    """The sample's JSON."""
    return format.canonical_json(
        {
            "key": pair.key,
            "height": plan.original[0],
            "width": plan.original[1],
            "image": pair.image.name,
            "mask": pair.mask.name,
            "group": pair.group,
            "fit": plan.to_json(),
            "flags": flags,
        }
    )
