"""The files of a set next to its shards: tables, lists and, published last, the index."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np

from shards import format
from shards.format import Counts, Index, ShardEntry
from shards.inputs.match import Pairing, Rejected
from shards.inputs.source import File
from shards.planning.duplicates import Duplicate
from shards.writing.index import publish_index
from shards.writing.records import SampleRow, ShardRecord
from shards.writing.target import WORK, FolderTarget
from tests.shards.conftest import pair_of


def record(name: str, keys: str, flags: dict[str, int]) -> ShardRecord:
    rows = [SampleRow(key, 4096 * n, [n + 1, 2, 3, 0], [9, 8, 7, 0], 60, 80, n) for n, key in enumerate(keys)]
    return ShardRecord(entry=ShardEntry(name=name, samples=len(rows), bytes=10240, sha256="ab"), rows=rows, flags=flags)


def test_the_index_counts_what_the_records_hold_and_the_tables_list_it(tmp_path: Path):
    (tmp_path / WORK).mkdir()
    records = [record("train/000000.tar", "AB", {}), record("train/000001.tar", "C", {"grey-mask": 1})]
    records.append(record("val/000000.tar", "D", {"grey-mask": 1}))
    pairs = [pair_of(key) for key in "ABCD"]
    rejected = [Rejected("E, copy.jpg", "no-mask", "there is no E_segmentation.png")]
    index = publish_index(
        FolderTarget(tmp_path),
        {"seed": 0, "size": 32},
        Pairing(pairs=pairs, rejected=rejected, ignored=[File(0, "LICENSE.txt", 1)]),
        records,
        rejected,
        [Duplicate("D", "B", "near", 5), Duplicate("B", "A", "bytes", 0)],
    )
    assert index == Index.parse((tmp_path / format.INDEX_NAME).read_bytes(), "here")
    assert index.counts == Counts(
        found=10,
        packed=8,
        rejected=1,
        ignored=1,
        reasons={"no-mask": 1},
        flags={"grey-mask": 2},
        duplicates={"bytes": 1, "near": 1},
        duplicates_across_splits=1,
    )
    assert {name: (split.samples, len(split.shards)) for name, split in index.splits.items()} == {
        "train": (3, 2),
        "val": (1, 1),
    }
    table = np.load(tmp_path / format.table_name("train"), allow_pickle=False)
    assert table["key"].tolist() == [b"A", b"B", b"C"]
    assert table["shard"].tolist() == [0, 0, 1]
    assert table["offset"].tolist() == [0, 4096, 0]
    assert table["size"].tolist() == [[1, 2, 3, 0], [2, 2, 3, 0], [1, 2, 3, 0]]
    assert table["foreground"].tolist() == [0, 1, 0]
    lists = [(tmp_path / name).read_text() for name in (format.REJECTED_NAME, format.DUPLICATES_NAME)]
    bad, duplicates = (list(csv.reader(io.StringIO(text))) for text in lists)
    assert bad[1:] == [["E, copy.jpg", "no-mask", "there is no E_segmentation.png"]]
    assert duplicates[1:] == [["B", "train", "A", "train", "bytes", "0"], ["D", "val", "B", "train", "near", "5"]]
