"""Cross-validation folds of a shard set that is already built: every image is held out once, and no sample is copied.

The samples of `train` and `val` are dealt into folds; every other split, such as `test`, is untouched. The fold of a
sample is a hash of its group (its key where there is none), so that a set that grows moves no image. Groups that
duplicate images connect are in one fold, as they are in one split (`shards.planning.duplicates`).

A fold makes two splits of the open set: its table is a selection of the rows of `train` and `val`, and its shards are
theirs. Order, streaming and scores do not differ from those of any other split.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from isicdist.config import Fold
from shards import format
from shards.errors import ShardSetError, UsageError
from shards.planning.duplicates import Duplicate, merge_groups
from shards.planning.split import keyed_hash
from shards.reader import ShardSet, Split

POOLED_SPLITS = ("train", "val")


def training_splits(shards: ShardSet, fold: Fold | None) -> tuple[Split, Split]:
    """Open the split that a run trains on and the one that it is validated on: `train` and `val`, or those of a fold.

    Raises what `ShardSet.split` and `open_fold` raise.
    """
    return open_fold(shards, fold) if fold else (shards.split("train"), shards.split("val"))


def open_fold(shards: ShardSet, fold: Fold) -> tuple[Split, Split]:
    """Open the samples to train on and the held-out ones of a fold.

    Reads the JSON of each sample: all shards of a remote set are downloaded. Raises UsageError when one of the two
    would be empty, ShardSetError when the list of duplicates is not the one of the index, and what `Split.read` raises.
    """
    return open_folds(shards, [fold])[0]


def open_folds(shards: ShardSet, folds: Sequence[Fold]) -> list[tuple[Split, Split]]:
    """Open several folds, at least one, of one cross-validation, as `open_fold` opens one."""
    pool, numbers = _deal(shards, folds[0].count)
    opened: list[tuple[Split, Split]] = []
    for fold in folds:
        held_out = _held_out(shards, numbers, fold)
        parts = ((f"{fold.name}_train", ~held_out), (fold.name, held_out))
        train, validation = (replace(pool, name=name, table=pool.table[rows]) for name, rows in parts)
        opened.append((train, validation))
    return opened


def fold_number(group: str, count: int) -> int:
    """Deal a group into one of `count` folds by its hash: a number from 1 to `count`."""
    return keyed_hash(0, "fold", group) % count + 1


def _deal(shards: ShardSet, count: int) -> tuple[Split, np.ndarray]:
    """Pool the samples to be held out, and give the number of the fold of each (n,)."""
    pool = _concatenate([shards.split(name) for name in POOLED_SPLITS if name in shards.index.splits], shards)
    return pool, np.array([fold_number(group, count) for group in merged_groups(shards, pool)])


def merged_groups(shards: ShardSet, split: Split) -> list[str]:
    """Give the group of each sample of a split: its own, or the one that duplicates connect it to.

    Reads the JSON of each sample. Raises ShardSetError when the list of duplicates is not the one of the index, and
    what `Split.read` raises.
    """
    groups = [str(split.meta(index)["group"]) for index in range(len(split))]
    merged = merge_groups(dict(zip(map(split.key, range(len(split))), groups, strict=True)), read_duplicates(shards))
    return [merged.get(group, group) for group in groups]


def _held_out(shards: ShardSet, numbers: np.ndarray, fold: Fold) -> np.ndarray:
    """Select the held-out samples of a fold, bool (n,). Raises UsageError where none or all are."""
    held_out = numbers == fold.number
    for rows, use in ((~held_out, "train on"), (held_out, "hold out")):
        if not rows.any():
            raise UsageError(
                f"{shards.location}: fold {fold} has none of its {len(numbers)} images to {use}; make fewer folds"
            )
    return held_out


def _concatenate(splits: list[Split], shards: ShardSet) -> Split:
    """Make one split of several: the rows of their tables and their shards, one after the other."""
    if not splits:
        raise UsageError(f"{shards.location}: it has no split {' or '.join(POOLED_SPLITS)} to make folds of")
    tables = [split.table.copy() for split in splits]
    first_shard = 0
    for split, table in zip(splits, tables, strict=True):
        table["shard"] += first_shard
        first_shard += len(split.entries)
    return replace(
        splits[0],
        name="+".join(split.name for split in splits),
        table=np.concatenate(tables),
        entries=tuple(entry for split in splits for entry in split.entries),
    )


def read_duplicates(shards: ShardSet) -> Iterable[Duplicate]:
    """Read the pairs of duplicates of a set; none in a set of a version that did not look for them."""
    kinds = shards.index.counts.duplicates
    if not kinds:
        return []
    path = shards.root / format.DUPLICATES_NAME
    try:
        data = shards.cached_set.remote.read(path.name) if shards.cached_set else path.read_bytes()
    except FileNotFoundError as error:
        raise ShardSetError(f"{path}: the list of duplicates is missing; copy or build the set again") from error
    try:
        found = [
            Duplicate(row["key"], row["duplicate_of"], row["same"], int(row["distance"]))  # pyright: ignore[reportArgumentType]
            for row in csv.DictReader(data.decode().splitlines())
        ]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ShardSetError(f"{path}: not a list of duplicates ({error!r}); copy or build the set again") from error
    if len(found) != sum(kinds.values()):
        raise ShardSetError(
            f"{path}: {len(found)} pairs of duplicates, but the index counts {sum(kinds.values())}; "
            "copy or build the set again"
        )
    return found
