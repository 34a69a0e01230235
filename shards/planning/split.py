"""Assign samples to splits, and order them within a split: pure functions of the seed and of names."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from shards.errors import UsageError
from shards.tables import read_column, read_column_of


def parse_fractions(text: str) -> dict[str, float]:
    """Parse the fractions of "train=0.8,val=0.1,test=0.1", in that order. Raises UsageError."""
    fractions: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (word.strip() for word in part.partition("="))
        try:
            fraction = float(value)
        except ValueError:
            fraction = math.nan
        if not name.isidentifier() or name in fractions or not 0 <= fraction <= 1:
            raise UsageError(f"--split {text}: {part!r} is no NAME=FRACTION; write train=0.8,val=0.1,test=0.1")
        if fraction:
            fractions[name] = fraction
    if not math.isclose(sum(fractions.values()), 1, abs_tol=1e-6):
        raise UsageError(f"--split {text}: the fractions sum to {sum(fractions.values()):g}; they must sum to 1")
    return fractions


def sorted_splits(splits: Iterable[str]) -> list[str]:
    """Sort the names of splits, each once: train, val, test, then others by name."""
    known = ("train", "val", "test")
    return sorted(set(splits), key=lambda name: (known.index(name) if name in known else len(known), name))


def keyed_hash(seed: int, purpose: str, name: str) -> int:
    """Hash (seed, purpose, name) to a uniform integer of 64 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{purpose}\0{name}".encode()).digest()[:8])


def split_of(group: str, fractions: Mapping[str, float], seed: int) -> str:
    """Assign a group to a split by its hash. No other group matters, so a set that grows moves no image."""
    point = keyed_hash(seed, "split", group) / 2**64
    edges = itertools.accumulate(fractions.values())
    inside = (name for name, edge in zip(fractions, edges, strict=True) if point < edge)
    return next(inside, list(fractions)[-1])  # rounding may leave the last edge a little under 1


def shuffled(keys: Iterable[str], seed: int) -> list[str]:
    """Shuffle keys into the order in which they are packed, whatever order they come in."""
    return sorted(keys, key=lambda key: (keyed_hash(seed, "order", key), key))


def read_groups(spec: str, keys: Iterable[str]) -> dict[str, str]:
    """Read the group of each key from FILE.csv:COLUMN; keys that are not in the table are left out.

    The image's column is isic_id, image_id, image or id, else the first. Raises UsageError when the file or the
    column is missing, or none of the keys is in the table.
    """
    _, table = read_column_of(spec, "--groups", "lesion_id")
    groups = {key: table[key] for key in keys if table.get(key)}
    if not groups:
        raise UsageError(f"--groups {spec}: it names none of the images; is it another set's table?")
    return groups


def split_of_source(location: str) -> str:
    """Recognise train, val or test in the name of an archive or folder, as in ISIC2018_Task1-2_Validation_Input.zip.

    Raises UsageError for a name with none of the words, or with several.
    """
    name = PurePosixPath(location.rstrip("/")).name.lower()
    found = [split for split, word in (("train", "train"), ("val", "valid"), ("test", "test")) if word in name]
    if len(found) != 1:
        raise UsageError(
            f"--split-archives: the name of {location} says {' and '.join(found) or 'no split'}; it must have one of "
            "Training, Validation and Test, else give --split-file"
        )
    return found[0]


def read_split_file(path: str, keys: Iterable[str], optional: Iterable[str] = ()) -> dict[str, str]:
    """Read the split of each key from a CSV file with the columns id and split; those of `optional` may be missing.

    Raises UsageError when a key is not in the table, or its split is no identifier.
    """
    table = read_column(Path(path), "split", "--split-file")
    splits = {key: table.get(key, "") for key in keys} | {key: table[key] for key in optional if table.get(key)}
    missing = [key for key, split in splits.items() if not split]
    if missing:
        raise UsageError(
            f"--split-file {path}: no split for {len(missing)} of the {len(splits)} images (first: {missing[0]}); "
            "add their rows, or take the images away"
        )
    for key, split in splits.items():
        if not split.isidentifier():
            raise UsageError(f"--split-file {path}: {key} has split {split!r}; use letters, as in train, val and test")
    return splits
