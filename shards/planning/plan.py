"""What a build will do, decided before anything is packed: pure, and the same for any number of workers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shards import format
from shards.errors import SourceError, UsageError
from shards.geometry import RESIZE_MODES, ResizeMode
from shards.inputs.match import MASK_SUFFIX, Pair
from shards.inputs.source import File
from shards.planning.split import in_order, parse_fractions, shuffled, split_of

OriginalMasks = Literal["none", "eval", "all"]
OnBadInput = Literal["fail", "skip"]
TRAIN = "train"
LARGEST_PART = 64  # pairs
PARTS_LEFT = 24  # a part is at most that fraction of the pairs that are left


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What decides the bytes of a shard set, beside its inputs."""

    size: int | None = 512
    """Side of the square images in pixels; None copies the originals, undecoded where nothing is odd about them."""
    fit: ResizeMode = "stretch"
    """How an image is brought to the square (`shards.geometry`)."""
    split: str = "train=0.8,val=0.1,test=0.1"
    """The fraction of the groups in each split."""
    split_file: str | None = None
    """CSV file with the columns id and split, instead of `split`."""
    groups: str | None = None
    """FILE.csv:COLUMN whose images of one value stay in one split; None: each image is its own group."""
    seed: int = 0
    """Decides which group is in which split, and the order in the shards."""
    samples_per_shard: int = 256
    """At most that many samples in a shard."""
    on_bad_input: OnBadInput = "fail"
    """fail: stop after all inputs have been checked; skip: leave them out and list them."""
    mask_suffix: str = MASK_SUFFIX
    """What a mask's name has after the key."""
    original_masks: OriginalMasks = "eval"
    """Where masks at their original resolution are kept: nowhere, in all splits but train, or in all."""

    def __post_init__(self) -> None:
        parse_fractions(self.split)
        if self.split_file is not None and self.split != BuildOptions.split:
            raise UsageError("--split and --split-file: give one of the two")
        if self.size is not None and not 16 <= self.size <= 8192:
            raise UsageError(f"--size {self.size}: give 16 to 8192 pixels, or original")
        if self.samples_per_shard < 1:
            raise UsageError(f"--samples-per-shard {self.samples_per_shard}: give 1 or more")
        if self.fit not in RESIZE_MODES:
            raise UsageError(f"--fit {self.fit}: give {', '.join(RESIZE_MODES)}")
        if not self.mask_suffix:
            raise UsageError("--mask-suffix: it cannot be empty, for it tells masks from images")

    def keeps_original(self, split: str) -> bool:
        """Whether a split's samples carry the mask at its original resolution."""
        return self.original_masks == "all" or (self.original_masks == "eval" and split != TRAIN)

    def to_json(self) -> dict[str, Any]:
        """For the index: no path of this machine, digests of the tables instead."""
        groups = None
        if self.groups is not None:
            path, _, column = self.groups.rpartition(":")
            groups = {"column": column, "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}
        split = ",".join(f"{name}={fraction:g}" for name, fraction in parse_fractions(self.split).items())
        if self.split_file is not None:
            split = f"file {hashlib.sha256(Path(self.split_file).read_bytes()).hexdigest()}"
        return {
            "fit": self.fit if self.size else "original",
            "groups": groups,
            "mask_suffix": self.mask_suffix,
            "on_bad_input": self.on_bad_input,
            "original_masks": self.original_masks,
            "samples_per_shard": self.samples_per_shard,
            "seed": self.seed,
            "size": self.size,
            "split": split,
        }


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """The samples of one shard, in order."""

    split: str
    number: int
    pairs: tuple[Pair, ...]
    groups: tuple[str, ...]
    """The group of each pair."""

    @property
    def name(self) -> str:
        """As in the index."""
        return format.shard_name(self.split, self.number)


@dataclass(frozen=True, slots=True)
class Part:
    """Pairs that one process encodes in one go."""

    name: str
    pairs: tuple[Pair, ...]
    groups: tuple[str, ...]
    """The group of each pair."""
    original: bool
    """Whether the samples carry the masks at their original resolution."""


def splits_by_hash(
    keys: Iterable[str], groups: Mapping[str, str], tied: Mapping[str, str], options: BuildOptions
) -> dict[str, str]:
    """The split of each key, by the hash of its group, or of the group that `tied` names instead of it.

    A key without a group is a group of its own.
    """
    fractions = parse_fractions(options.split)
    names = ((key, groups.get(key, key)) for key in keys)
    return {key: split_of(tied.get(name, name), fractions, options.seed) for key, name in names}


def check_filled(splits: Mapping[str, str], options: BuildOptions, given: Mapping[str, str]) -> None:
    """Raise SourceError when a split of `options`, or of those that were given if any, gets nothing."""
    names, filled = dict.fromkeys(given.values()) or parse_fractions(options.split), set(splits.values())
    empty = [name for name in names if name not in filled]
    if empty:
        hint = (
            "mend its images (--on-bad-input fail lists what is wrong) or take it out of the --split-file"
            if given
            else "give more images, other fractions (--split) or another --seed"
        )
        raise SourceError(f"split {empty[0]} gets none of the {len(splits)} pairs; {hint}")


def check_groups(splits: Mapping[str, str], groups: Mapping[str, str]) -> None:
    """Raise UsageError that names a group whose images are in two of the given splits."""
    first: dict[str, str] = {}
    for key, group in groups.items():
        other = first.setdefault(group, key)
        if splits[other] != splits[key]:
            raise UsageError(
                f"--split-file: group {group} is in two splits ({other} in {splits[other]}, {key} in {splits[key]}); "
                "put its images into one"
            )


def plan_shards(
    pairs: Iterable[Pair], splits: Mapping[str, str], groups: Mapping[str, str], options: BuildOptions
) -> list[PlannedShard]:
    """Which pairs go into which shard. A pair without a group is a group of its own, named by its key."""
    by_key = {pair.key: pair for pair in pairs}
    members: dict[str, list[str]] = {name: [] for name in in_order(splits.values())}
    for key in by_key:
        members[splits[key]].append(key)
    shards: list[PlannedShard] = []
    for split, keys in members.items():
        ordered = shuffled(keys, options.seed)
        for number, start in enumerate(range(0, len(ordered), options.samples_per_shard)):
            part = ordered[start : start + options.samples_per_shard]
            chosen = tuple(by_key[key] for key in part)
            shards.append(PlannedShard(split, number, chosen, tuple(groups.get(key, key) for key in part)))
    return shards


def cut(shards: Iterable[PlannedShard], options: BuildOptions, turn: int) -> list[Part]:
    """The pairs of some shards in parts, in order; `turn` tells their names from those of other parts.

    The parts get smaller, so that no process has long to wait for another at the end.
    """
    shards = list(shards)
    rest = sum(len(shard.pairs) for shard in shards)
    parts: list[Part] = []
    for shard in shards:
        start = 0
        while start < len(shard.pairs):
            size = min(max(rest // PARTS_LEFT, 1), LARGEST_PART)
            pairs = shard.pairs[start : start + size]
            groups = shard.groups[start : start + size]
            # A digit first, so that it is no split's shard.
            parts.append(Part(f"{turn}-{len(parts):06d}", pairs, groups, options.keeps_original(shard.split)))
            start += len(pairs)
            rest -= len(pairs)
    return parts


def digest_of_files(files: Iterable[File], *, with_times: bool) -> str:
    """sha256 over the files' names, sizes and checksums where known; `with_times` adds when they changed."""
    rows = [[f.source, f.name, f.size, f.crc, f.changed if with_times else 0] for f in files]
    return hashlib.sha256(format.canonical_json(rows)).hexdigest()
