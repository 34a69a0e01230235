"""Publish the sample tables, the lists of rejected inputs and of duplicates and, last, the index of a set."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from dataclasses import astuple
from typing import Any

import numpy as np

from shards import format
from shards.format import Counts, FileEntry, Index, SplitEntry
from shards.inputs.match import Pairing, Rejected
from shards.planning.duplicates import Duplicate
from shards.planning.split import sorted_splits
from shards.tables import csv_bytes
from shards.writing.records import ShardRecord
from shards.writing.target import Target, write_bytes


def publish_index(
    target: Target,
    built: dict[str, Any],
    pairing: Pairing,
    records: list[ShardRecord],
    rejected: list[Rejected],
    duplicates: list[Duplicate],
) -> Index:
    """Publish all files of a set but its shards, the index last; the index.

    `built`: the options (`BuildOptions.to_json`) and the digest of the inputs, for the index. `records`: of all shards,
    in the plan's order. `rejected`: files of `pairing`, and those that could not be encoded.
    """
    split_of_key = {row.key: _split_of(record) for record in records for row in record.rows}
    splits: dict[str, SplitEntry] = {}
    flags: Counter[str] = Counter()
    for name in sorted_splits(map(_split_of, records)):
        in_split = [record for record in records if _split_of(record) == name]
        table = _table(in_split)
        write_bytes(target, format.table_name(name), table)
        splits[name] = SplitEntry(
            samples=sum(record.entry.samples for record in in_split),
            table=FileEntry(name=format.table_name(name), bytes=len(table), sha256=hashlib.sha256(table).hexdigest()),
            shards=tuple(record.entry for record in in_split),
        )
        for record in in_split:
            flags.update(record.flags)
    write_bytes(target, format.REJECTED_NAME, csv_bytes(("path", "reason", "detail"), map(astuple, rejected)))
    pairs = [
        (d.key, split_of_key[d.key], d.duplicate_of, split_of_key[d.duplicate_of], d.kind, d.distance)
        for d in sorted(duplicates)
    ]
    columns = ("key", "split", "duplicate_of", "split_of_that", "same", "distance")
    write_bytes(target, format.DUPLICATES_NAME, csv_bytes(columns, pairs))
    kinds = Counter(duplicate.kind for duplicate in duplicates)
    counts = Counts(
        found=pairing.found,
        packed=2 * sum(record.entry.samples for record in records),
        rejected=len(rejected),
        ignored=len(pairing.ignored),
        reasons=dict(sorted(Counter(row.reason for row in rejected).items())),
        flags=dict(sorted(flags.items())),
        duplicates=dict(sorted(kinds.items())),
        duplicates_across_splits=sum(row[1] != row[3] for row in pairs),
    )
    index = Index.new(size=built["size"], built=built, counts=counts, splits=splits)
    write_bytes(target, format.INDEX_NAME, format.canonical_json(index.to_json()))
    return index


def _split_of(record: ShardRecord) -> str:
    return record.entry.name.partition("/")[0]


def _table(records: list[ShardRecord]) -> bytes:
    """The sample table of a split as a .npy file; `records` are its shards in their order."""
    rows = [
        (row.key.encode(), shard, row.offset, row.sizes, row.crcs, row.height, row.width, row.foreground)
        for shard, record in enumerate(records)
        for row in record.rows
    ]
    dtype = format.sample_dtype(max((len(row[0]) for row in rows), default=1))
    buffer = io.BytesIO()
    np.save(buffer, np.array(rows, dtype=dtype), allow_pickle=False)
    return buffer.getvalue()
