"""Pair images with masks by their names, without reading them (`shards.inputs.decode` does).

Every file is put into one of three lists: part of a pair, rejected with a reason, or ignored because it is known to be
neither image nor mask.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from shards import format
from shards.errors import SourceError, UsageError
from shards.inputs.source import IMAGE_TYPES, OTHER_IMAGE_TYPES, PICTURE_TYPES, File
from shards.tables import DOWNSAMPLED

MASK_SUFFIX = "_segmentation"

_NEITHER = re.compile(r"_superpixels$|_R\d+_Label\d+$", re.IGNORECASE)  # of ISIC; regions of interest of PH2

EXCLUDED = "excluded"
REASONS = {
    EXCLUDED: "a pair that the table of --exclude names",
    "no-mask": "an image without a mask",
    "no-image": "a mask without an image",
    "illegal-key": "a name that cannot be a WebDataset key",
    "duplicate-key": "more than one image or mask for a key (upper and lower case count as one)",
    "unsupported": "an image in a format other than JPEG, PNG and BMP",
    "unreadable": "bytes that do not decode",
    "truncated": "a file that ends too early",
    "pixel-limit": "more pixels or bytes than an honest photograph has",
    "size-mismatch": "an image and a mask of different sizes",
    "orientation": "an EXIF rotation that may or may not hold for the mask",
    "mask-values": "a mask whose values can be read in more than one way",
    "partner": "a file whose image or mask was rejected",
}


@dataclass(frozen=True, slots=True)
class Rejected:
    """A rejected input file: a row of rejected.csv."""

    path: str
    """Path inside its source."""
    reason: str
    """A key of `REASONS`."""
    detail: str
    """Explanation, for the user."""


@dataclass(frozen=True, slots=True)
class Pair:
    """An image and its mask."""

    key: str
    image: File
    mask: File
    group: str
    """Name of the group that stays in one split: its key, where no table of groups has another."""


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """Result of `pair_files`: each file is in exactly one of the three lists."""

    pairs: list[Pair]
    """Sorted by key."""
    rejected: list[Rejected]
    ignored: list[File]

    @property
    def found(self) -> int:
        """Number of files in all three lists."""
        return 2 * len(self.pairs) + len(self.rejected) + len(self.ignored)


class BadInputError(SourceError):
    """Inputs that cannot be used, in a build with `--on-bad-input fail`; `rejected` lists all of them."""

    def __init__(self, rejected: list[Rejected]) -> None:
        first = next((row for row in rejected if row.reason != "partner"), rejected[0])
        super().__init__(
            f"{len(rejected)} of the input files cannot be used (first: {first.path}: {first.reason}, {first.detail}); "
            "mend them or leave them out with --on-bad-input skip"
        )
        self.rejected = rejected


def pair_files(files: Iterable[File], mask_suffix: str = MASK_SUFFIX, mask_sources: Collection[int] = ()) -> Pairing:
    """Pair images with masks by name: KEY.jpg with KEY<mask_suffix>.png, in any folders.

    `mask_sources`: numbers of the sources that hold masks only. Where no file in them has the suffix, a mask has the
    name of its image. KEY_downsampled.jpg, as ISIC 2019 names what was reduced, is paired with the mask of KEY. Names
    are compared without regard to case, so no two keys differ by case only. Raises SourceError when there is no pair.
    """
    files = list(files)
    named_alike = bool(mask_sources) and _are_named_alike(files, mask_suffix, mask_sources)
    images: dict[str, list[tuple[str, File]]] = defaultdict(list)
    masks: dict[str, list[tuple[str, File]]] = defaultdict(list)
    pairs: list[Pair] = []
    rejected: list[Rejected] = []
    ignored: list[File] = []
    for file in files:
        stem, kind = _stem_and_type(file.name)
        if _is_ignored(file.name, stem, kind):
            ignored.append(file)
        elif kind in OTHER_IMAGE_TYPES:
            rejected.append(_unsupported(file))
        elif named_alike and file.source in mask_sources:
            masks[stem.lower()].append((stem, file))
        elif stem.lower().endswith(mask_suffix.lower()):
            key = stem[: len(stem) - len(mask_suffix)]
            masks[key.lower()].append((key, file))
        else:
            images[stem.lower()].append((stem, file))
    for folded in [name for name in images if name.endswith(DOWNSAMPLED)]:
        key = folded.removesuffix(DOWNSAMPLED)
        if folded not in masks and key in masks and key not in images:
            images[key] = [(stem[: -len(DOWNSAMPLED)], file) for stem, file in images.pop(folded)]
    for folded in sorted(images.keys() | masks.keys()):
        _pair_one(images.get(folded, []), masks.get(folded, []), mask_suffix, pairs, rejected)
    known = [row for row in rejected if row.reason not in ("no-mask", "no-image")]
    if not pairs and known:
        raise SourceError(
            f"no pair can be used: {len(known)} files are rejected (first: {known[0].path}: {known[0].reason}, "
            f"{known[0].detail}); mend their names or formats"
        )
    if not pairs:
        archives = sum(file.name.lower().endswith(".zip") for file in ignored)
        closed = f" ({archives} .zip archives among them were not opened: name each)" if archives else ""
        raise SourceError(
            f"no image has a mask: {len(images)} images, {len(masks)} masks named KEY{mask_suffix}.png{closed}; "
            "check --images, --masks and --mask-suffix"
        )
    pairs.sort(key=lambda pair: pair.key)
    return Pairing(pairs=pairs, rejected=rejected, ignored=ignored)


def exclude_pairs(pairing: Pairing, excluded: Collection[str], table: str) -> Pairing:
    """Reject the pairs of some keys for the reason `excluded`; `table` is the path of the table that names them.

    Raises UsageError where it names no pair, or all.
    """
    pairs = [pair for pair in pairing.pairs if pair.key not in excluded]
    if len(pairs) == len(pairing.pairs):
        raise UsageError(f"--exclude {table}: it names none of the images; is it another set's table?")
    if not pairs:
        raise UsageError(f"--exclude {table}: it names all {len(pairing.pairs)} pairs; nothing would be built")
    out = [pair for pair in pairing.pairs if pair.key in excluded]
    files = [file for pair in out for file in (pair.image, pair.mask)]
    rejected = [Rejected(file.name, EXCLUDED, f"named by {PurePosixPath(table).name}") for file in files]
    return replace(pairing, pairs=pairs, rejected=pairing.rejected + rejected)


def images_only(files: Iterable[File]) -> tuple[list[File], list[Rejected], list[File]]:
    """List the images by their names, reject the files of image types that are not supported, and list the others.

    The others are ignored: masks by their names, and the other files of the archives (superpixels, licences).
    """
    images: list[File] = []
    ignored: list[File] = []
    rejected: list[Rejected] = []
    for file in files:
        stem, kind = _stem_and_type(file.name)
        if _is_ignored(file.name, stem, kind) or stem.lower().endswith(MASK_SUFFIX):
            ignored.append(file)
        elif kind in IMAGE_TYPES:
            images.append(file)
        else:
            rejected.append(_unsupported(file))
    return images, rejected, ignored


def _pair_one(
    images: list[tuple[str, File]],
    masks: list[tuple[str, File]],
    mask_suffix: str,
    pairs: list[Pair],
    rejected: list[Rejected],
) -> None:
    """Pair the image and the mask of one key, or reject all of its files."""
    all_files = [file for _, file in images + masks]
    key = (images or masks)[0][0]
    if not format.KEY_PATTERN.match(key):
        detail = f"key {key!r}: use 1 to 80 letters, digits, _ and - and no dot"
        rejected += [Rejected(file.name, "illegal-key", detail) for file in all_files]
    elif len(images) > 1 or len(masks) > 1:
        # Which image belongs to which mask would be a guess, so all of them are rejected.
        detail = f"key {key}: " + ", ".join(file.name for file in all_files)
        rejected += [Rejected(file.name, "duplicate-key", detail) for file in all_files]
    elif not masks:
        rejected.append(Rejected(all_files[0].name, "no-mask", f"there is no {key}{mask_suffix}.png"))
    elif not images:
        rejected.append(Rejected(all_files[0].name, "no-image", f"there is no {key}.jpg"))
    else:
        pairs.append(Pair(key, images[0][1], masks[0][1], key))


def _stem_and_type(name: str) -> tuple[str, str]:
    """Split a/b/ISIC_1.JPG into (ISIC_1, .jpg); without pathlib, which takes half a minute for a million pairs."""
    stem, kind = os.path.splitext(name.rpartition("/")[2])  # noqa: PTH122
    return stem, kind.lower()


def _are_named_alike(files: list[File], mask_suffix: str, mask_sources: Collection[int]) -> bool:
    """Recognise sources in which no mask has the suffix, and some mask has the name of an image."""
    stems = {True: set[str](), False: set[str]()}  # of the masks' sources, of the others
    for file in files:
        stems[file.source in mask_sources].add(_stem_and_type(file.name)[0].lower())
    return not any(stem.endswith(mask_suffix.lower()) for stem in stems[True]) and bool(stems[True] & stems[False])


def _is_ignored(name: str, stem: str, kind: str) -> bool:
    if any(part == "__MACOSX" or (part[:1] == "." and part != ".") for part in name.split("/")):
        return True
    return kind not in PICTURE_TYPES or bool(_NEITHER.search(stem))


def _unsupported(file: File) -> Rejected:
    detail = f"{PurePosixPath(file.name).suffix} is not read; convert it to PNG or JPEG"
    return Rejected(file.name, "unsupported", detail)
