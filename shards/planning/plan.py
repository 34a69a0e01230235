"""Plan a build: assign pairs to splits, shards and parts, by pure functions that do not depend on the workers."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from shards import format
from shards.errors import SourceError, UsageError
from shards.geometry import RESIZE_MODES, ResizeMode
from shards.inputs.match import MASK_SUFFIX, Pair
from shards.inputs.source import File
from shards.planning.split import parse_fractions, shuffled, sorted_splits, split_of
from shards.tables import parse_column_spec

OriginalMasks = Literal["none", "eval", "all"]
OnBadInput = Literal["fail", "skip"]
TRAIN = "train"
MAX_PART_PAIRS = 64
MAX_GROUP_IMAGES, MAX_GROUP_SHARE = 20, 0.05
"""Images of a group, and their share of all, above both of which it is warned of."""
MIN_EXPECTED = 20
"""Images that a split should have for it to be warned of, when it has less than half of them or more than twice."""
MIN_REMAINING_PARTS = 24  # a part holds at most 1/24 of the remaining pairs, so the last parts are small


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Flags of `isic-shards build` that, with the inputs, decide the bytes of a shard set. Raises UsageError."""

    size: int | Literal["original"] = 512
    """Side of the square images in pixels, or original to copy images and masks as they are."""
    fit: ResizeMode = "stretch"
    """Resize mode: change the aspect ratio, pad with black, or crop to the centre."""
    split: str = "train=0.8,val=0.1,test=0.1"
    """Fraction of the groups in each split."""
    split_file: str | None = None
    """FILE.csv with the columns id and split, instead of --split."""
    split_archives: bool = False
    """Take the split from the names of the archives or folders of the images, which have Training, Validation or Test
    in them; instead of --split."""
    groups: str | None = None
    """FILE.csv:COLUMN, as metadata.csv:lesion_id; the images of one value stay in one split."""
    seed: int = 0
    """Random seed of the splits and of the order in the shards."""
    samples_per_shard: int = 256
    """Maximum number of samples in one shard."""
    on_bad_input: OnBadInput = "fail"
    """fail: check all inputs, list the bad ones and build nothing; skip: exclude them and list them."""
    mask_suffix: str = MASK_SUFFIX
    """Suffix of a mask's file name after that of its image."""
    original_masks: OriginalMasks = "eval"
    """Which splits keep the masks at original resolution: none, eval (all but train), or all."""
    exclude: str | None = None
    """FILE.csv with the column id, as of isicdist audit: leave out the images of the verdict wrong (without a column
    verdict, all of the table)."""

    def __post_init__(self) -> None:
        parse_fractions(self.split)
        if self.split_file is not None and self.split != BuildOptions.split:
            raise UsageError("--split and --split-file: give one of the two")
        if self.split_archives and (self.split_file is not None or self.split != BuildOptions.split):
            raise UsageError("--split-archives: give it alone, without --split and --split-file")
        if self.size != "original" and self.size not in range(16, format.MAX_SIZE + 1):
            raise UsageError(f"--size {self.size}: give 16 to {format.MAX_SIZE} pixels, or original")
        if self.samples_per_shard < 1:
            raise UsageError(f"--samples-per-shard {self.samples_per_shard}: give 1 or more")
        choices = {"fit": RESIZE_MODES, "on_bad_input": get_args(OnBadInput), "original_masks": get_args(OriginalMasks)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"{flag} {getattr(self, name)}: give {', '.join(allowed)}")
        if not self.mask_suffix:
            raise UsageError("--mask-suffix: it cannot be empty, for it tells masks from images")

    @property
    def side(self) -> int | None:
        """Side of the square images in pixels; None where they are copied as they are."""
        return None if self.size == "original" else self.size

    def keeps_original(self, split: str) -> bool:
        """True if the samples of a split carry the mask at its original resolution."""
        return self.original_masks == "all" or (self.original_masks == "eval" and split != TRAIN)

    def to_json(self) -> dict[str, Any]:
        """The options as the index records them: tables by column and sha256, without paths of this machine.

        Raises OSError when a table cannot be read.
        """
        groups = None
        if self.groups is not None:
            path, column = parse_column_spec(self.groups, "--groups", "lesion_id")
            groups = {"column": column, "sha256": _sha256_of(path)}
        split = ",".join(f"{name}={fraction:g}" for name, fraction in parse_fractions(self.split).items())
        if self.split_file is not None:
            split = f"file {_sha256_of(Path(self.split_file))}"
        if self.split_archives:
            split = "archives"
        # A set without exclusions has the digest that it had before there were any.
        exclude = {} if self.exclude is None else {"exclude": _sha256_of(Path(self.exclude))}
        return exclude | {
            "fit": self.fit if self.side else "original",
            "groups": groups,
            "mask_suffix": self.mask_suffix,
            "on_bad_input": self.on_bad_input,
            "original_masks": self.original_masks,
            "samples_per_shard": self.samples_per_shard,
            "seed": self.seed,
            "size": self.side,
            "split": split,
        }


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """One shard of the plan: its samples, in order."""

    split: str
    number: int
    """Number of the shard in its split, from 0."""
    pairs: tuple[Pair, ...]

    @property
    def name(self) -> str:
        """Name of the shard in the index, as train/000007.tar."""
        return format.shard_name(self.split, self.number)


@dataclass(frozen=True, slots=True)
class Part:
    """Work item of the encoding: pairs that one process encodes into one tar."""

    name: str
    pairs: tuple[Pair, ...]
    keep_original: bool
    """Keep the masks at their original resolution."""


def splits_by_hash(pairs: Iterable[Pair], merged: Mapping[str, str], options: BuildOptions) -> dict[str, str]:
    """Assign the key of each pair to a split by the hash of its group, or of the group that `merged` maps that one to.

    `merged`: see `shards.planning.duplicates.merge_groups`.
    """
    fractions = parse_fractions(options.split)
    return {pair.key: split_of(merged.get(pair.group, pair.group), fractions, options.seed) for pair in pairs}


def check_not_empty(
    pairs: Collection[Pair], splits: Mapping[str, str], options: BuildOptions, split_table: Mapping[str, str]
) -> None:
    """Raise SourceError when a split has no pair: a split of `split_table`, or without one of `options.split`."""
    names, filled = dict.fromkeys(split_table.values()) or parse_fractions(options.split), set(splits.values())
    empty = [name for name in names if name not in filled]
    if empty:
        if split_table:
            out = "leave out its archive" if options.split_archives else "take it out of the --split-file"
            hint = f"mend its images (--on-bad-input fail lists what is wrong) or {out}"
        else:
            hint = _large_group(pairs, options) or "give more images, other fractions (--split) or another --seed"
        raise SourceError(f"split {empty[0]} gets none of the {len(splits)} pairs; {hint}")


def split_warnings(pairs: Collection[Pair], splits: Mapping[str, str], options: BuildOptions) -> list[str]:
    """Describe what makes the splits by hash of these pairs uneven, a line each; empty when nothing does.

    That is a group of more than MAX_GROUP_IMAGES and MAX_GROUP_SHARE, as a placeholder in its column makes, and a split
    far from its fraction.
    """
    large_group = _large_group(pairs, options)
    warnings = [large_group] if large_group else []
    numbers = Counter(splits[pair.key] for pair in pairs)
    for name, fraction in parse_fractions(options.split).items():
        expected = fraction * len(pairs)
        if expected >= MIN_EXPECTED and not expected / 2 <= numbers[name] <= 2 * expected:
            warnings.append(
                f"split {name} has {numbers[name]} of the {len(pairs)} images, not about {expected:.0f} (groups and "
                "duplicates stay together); another --seed may be nearer, or give a --split-file"
            )
    return warnings


def _large_group(pairs: Collection[Pair], options: BuildOptions) -> str:
    """Describe the largest group where it has so many images that it may stand for no value; else nothing."""
    sizes = Counter(pair.group for pair in pairs).most_common() if options.groups is not None else []
    large = [each for each in sizes if each[1] > max(MAX_GROUP_IMAGES, MAX_GROUP_SHARE * len(pairs))]
    if not large or options.groups is None:
        return ""
    _, column = parse_column_spec(options.groups, "--groups", "lesion_id")
    others = f" (the largest of {len(large)} large groups)" if large[1:] else ""
    return (
        f"--groups: {large[0][1]} of the {len(pairs)} images have {column} {large[0][0]!r}{others}, and so are in one "
        "split; if it stands for no value, leave it empty in the table"
    )


def check_groups(pairs: Iterable[Pair], splits: Mapping[str, str], options: BuildOptions) -> None:
    """Raise UsageError that names a group whose images a split file, or the archives, put into two splits."""
    first: dict[str, str] = {}
    for pair in pairs:
        key, group = pair.key, pair.group
        other = first.setdefault(group, key)
        if splits[other] != splits[key]:
            flag, hint = "--split-file", "put its images into one or, where it stands for no value, leave it empty"
            if options.split_archives:
                flag, hint = "--split-archives", "give a --split-file with its images in one, or leave out --groups"
            raise UsageError(
                f"{flag}: group {group} is in two splits ({other} in {splits[other]}, {key} in {splits[key]}); {hint}"
            )


def plan_shards(pairs: Iterable[Pair], splits: Mapping[str, str], options: BuildOptions) -> list[PlannedShard]:
    """Shuffle the pairs of each split and divide them into shards."""
    by_key = {pair.key: pair for pair in pairs}
    members: dict[str, list[str]] = {name: [] for name in sorted_splits(splits.values())}
    for key in by_key:
        members[splits[key]].append(key)
    shards: list[PlannedShard] = []
    for split, keys in members.items():
        ordered = shuffled(keys, options.seed)
        for number, start in enumerate(range(0, len(ordered), options.samples_per_shard)):
            chosen = tuple(by_key[key] for key in ordered[start : start + options.samples_per_shard])
            shards.append(PlannedShard(split, number, chosen))
    return shards


def split_into_parts(shards: Iterable[PlannedShard], options: BuildOptions, encoding_pass: int) -> list[Part]:
    """Divide the pairs of shards into parts, in order; their names begin with `encoding_pass`.

    The parts get smaller, so that at the end no process waits long for another.
    """
    shards = list(shards)
    remaining = sum(len(shard.pairs) for shard in shards)
    parts: list[Part] = []
    for shard in shards:
        start = 0
        while start < len(shard.pairs):
            size = min(max(remaining // MIN_REMAINING_PARTS, 1), MAX_PART_PAIRS)
            pairs = shard.pairs[start : start + size]
            # A digit first, so that it is not the name of a split's shard.
            name = f"{encoding_pass}-{len(parts):06d}"
            parts.append(Part(name, pairs, options.keeps_original(shard.split)))
            start += len(pairs)
            remaining -= len(pairs)
    return parts


def digest_of_files(files: Iterable[File], *, with_times: bool) -> str:
    """sha256 over the files' names, sizes and known checksums; `with_times` adds the times of their last change."""
    rows = [[f.source, f.name, f.size, f.crc, f.changed if with_times else 0] for f in files]
    return hashlib.sha256(format.canonical_json(rows)).hexdigest()


def _sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
