"""Which split a sample belongs to, and its place in it: pure functions of the seed and of names."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from shards.errors import UsageError
from shards.tables import read_column, read_column_of


def parse_fractions(text: str) -> dict[str, float]:
    """The fractions of "train=0.8,val=0.1,test=0.1", in that order. Raises UsageError."""
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


def in_order(splits: Iterable[str]) -> list[str]:
    """The names of splits, each once, as they are shown: train, val, test, then others."""
    known = ("train", "val", "test")
    return sorted(set(splits), key=lambda name: (known.index(name) if name in known else len(known), name))


def keyed_hash(seed: int, purpose: str, name: str) -> int:
    """64 uniform bits that belong to (seed, purpose, name)."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{purpose}\0{name}".encode()).digest()[:8])


def split_of(group: str, fractions: Mapping[str, float], seed: int) -> str:
    """The split of a group. It depends on nothing else, so a set that grows moves no image."""
    point = keyed_hash(seed, "split", group) / 2**64
    edges = itertools.accumulate(fractions.values())
    inside = (name for name, edge in zip(fractions, edges, strict=True) if point < edge)
    return next(inside, list(fractions)[-1])  # rounding may leave the last edge a little under 1


def shuffled(keys: Iterable[str], seed: int) -> list[str]:
    """The keys in the order in which they are packed, whatever order they come in."""
    return sorted(keys, key=lambda key: (keyed_hash(seed, "order", key), key))


def read_groups(spec: str, keys: Iterable[str]) -> dict[str, str]:
    """The group of each key that FILE.csv:COLUMN names; keys that it does not name have none.

    The image's column is isic_id, image_id, image or id, else the first. Raises UsageError when the file, the
    column, or any match with the keys is missing.
    """
    _, table = read_column_of(spec, "--groups", "lesion_id")
    groups = {key: table[key] for key in keys if table.get(key)}
    if not groups:
        raise UsageError(f"--groups {spec}: it names none of the images; is it another set's table?")
    return groups


def read_split_file(path: str, keys: Iterable[str]) -> dict[str, str]:
    """The split of each key, from a CSV file with the columns id and split.

    Raises UsageError unless it has them all.
    """
    table = read_column(Path(path), "split", "--split-file")
    given = {key: table.get(key, "") for key in keys}
    missing = [key for key, split in given.items() if not split]
    if missing:
        raise UsageError(
            f"--split-file {path}: no split for {len(missing)} of the {len(given)} images (first: {missing[0]}); "
            "add their rows, or take the images away"
        )
    for key, split in given.items():
        if not split.isidentifier():
            raise UsageError(f"--split-file {path}: {key} has split {split!r}; use letters, as in train, val and test")
    return given
