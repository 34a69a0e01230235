"""The end of a build: the sample tables, the lists of rejected inputs and of duplicates and, last, the index."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

import numpy as np

from shards import format
from shards.inputs.match import Pairing, Rejected
from shards.planning.duplicates import Duplicate
from shards.planning.plan import BuildOptions
from shards.planning.split import in_order
from shards.tables import csv_bytes
from shards.writing.staging import ShardRecord
from shards.writing.target import Target, publish


def publish_index(
    target: Target,
    built: dict[str, Any],
    options: BuildOptions,
    pairing: Pairing,
    records: list[ShardRecord],
    rejected: list[Rejected],
    duplicates: list[Duplicate],
    split_of_key: Mapping[str, str],
) -> dict[str, Any]:
    """Publish what a set has beside its shards; the index. `built` is what it says of how the set was built."""
    splits = {}
    flags: Counter[str] = Counter()
    for name in in_order(split_of_key.values()):
        mine = [record for record in records if record.name.startswith(f"{name}/")]
        table = _table(mine)
        publish(target, format.table_name(name), table)
        entry = {
            "name": format.table_name(name),
            "bytes": len(table),
            "sha256": hashlib.sha256(table).hexdigest(),
        }
        shards = [{k: getattr(r, k) for k in ("name", "samples", "bytes", "sha256")} for r in mine]
        splits[name] = {"samples": sum(r.samples for r in mine), "table": entry, "shards": shards}
        for record in mine:
            flags.update(record.flags)
    publish(target, format.REJECTED_NAME, csv_bytes(("path", "reason", "detail"), map(astuple, rejected)))
    pairs = [(d.key, split_of_key[d.key], d.of, split_of_key[d.of], d.same, d.distance) for d in sorted(duplicates)]
    columns = ("key", "split", "duplicate_of", "split_of_that", "same", "distance")
    publish(target, format.DUPLICATES_NAME, csv_bytes(columns, pairs))
    same = Counter(duplicate.same for duplicate in duplicates)
    index = {
        "format": format.FORMAT,
        "version": format.VERSION,
        "size": options.size,
        "built": built,
        "counts": {
            "found": pairing.found,
            "packed": 2 * sum(record.samples for record in records),
            "rejected": len(rejected),
            "ignored": len(pairing.ignored),
            "reasons": dict(sorted(Counter(row.reason for row in rejected).items())),
            "flags": dict(sorted(flags.items())),
            "duplicates": dict(sorted(same.items())),
            "duplicates_across_splits": sum(row[1] != row[3] for row in pairs),
        },
        "splits": splits,
    }
    index["digest"] = format.digest_of(index)
    publish(target, format.INDEX_NAME, format.canonical_json(index))
    return index


def _table(records: list[ShardRecord]) -> bytes:
    rows = [
        (key.encode(), shard, offset, sizes, crcs, height, width, foreground)
        for shard, record in enumerate(records)
        for key, offset, sizes, crcs, height, width, foreground in record.rows
    ]
    dtype = format.sample_dtype(max((len(row[0]) for row in rows), default=1))
    buffer = io.BytesIO()
    np.save(buffer, np.array(rows, dtype=dtype), allow_pickle=False)
    return buffer.getvalue()
