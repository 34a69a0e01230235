"""The records of the work folder come back as they were written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shards import format
from shards.errors import ToolkitError
from shards.format import ShardEntry
from shards.inputs.match import Rejected
from shards.planning.plan import PlannedShard
from shards.writing.records import (
    PartRecord,
    SampleRow,
    ShardRecord,
    StagedSample,
    part_record_name,
    read_record,
    shard_record_name,
    tar_name,
    write_record,
)
from shards.writing.target import WORK, FolderTarget


def staged(key: str, offset: int | None) -> StagedSample:
    members = [] if offset is None else [10, 20, 30, 0]
    return StagedSample(
        key=key,
        offset=offset,
        sizes=members,
        crcs=members or [1, 2],
        original=(60, 80),
        foreground=format.UNCOUNTED if offset is None else 7,
        has_lesion=True,
        flags=["copied"] if offset is None else [],
        hash="00" * 32,
        is_bytes_hash=offset is None,
    )


def test_a_part_record_comes_back_as_it_was_written(tmp_path: Path):
    # A file name of a Linux folder need not be UTF-8: Python reads its bytes as surrogates.
    rejected = [Rejected("a\udcff.jpg", "truncated", "an image file is truncated")]
    record = PartRecord(samples=[staged("A", 0), staged("B", None)], rejected=rejected)
    target = FolderTarget(tmp_path)
    write_record(target, part_record_name("0-000000"), record.to_json())
    assert PartRecord.from_json(read_record(target, part_record_name("0-000000"))) == record


def test_a_shard_record_comes_back_as_it_was_written():
    rows = [
        SampleRow("A", 0, [10, 20, 30, 0], [1, 2, 3, 0], 60, 80, 7),
        SampleRow("B", 4096, [11, 21, 31, 41], [2**32 - 1, 2, 3, 4], 60, 80, format.UNCOUNTED),
    ]
    entry = ShardEntry(name="train/000000.tar", samples=2, bytes=20480, sha256="ab" * 32)
    record = ShardRecord(entry=entry, rows=rows, flags={"copied": 1})
    again = ShardRecord.from_json(json.loads(json.dumps(record.to_json())))
    assert again == record
    assert again.rows[1].foreground == format.UNCOUNTED


def test_no_part_has_the_name_of_a_shard_s_record():
    shard = PlannedShard("train", 3, ())
    names = {part_record_name("0-000003"), tar_name("0-000003"), shard_record_name(shard)}
    assert names == {f"{WORK}/0-000003.json", f"{WORK}/0-000003.tar", f"{WORK}/train-000003.json"}


def test_a_damaged_record_is_refused_whichever_byte_it_is(tmp_path: Path):
    target, name = FolderTarget(tmp_path), f"{WORK}/plan.json"
    write_record(target, name, {"seed": 1})
    data = (tmp_path / name).read_bytes()
    damaged = [data[:n] + bytes([data[n] ^ 1]) + data[n + 1 :] for n in range(len(data))]
    for each in (*damaged, *(data[:n] for n in range(len(data))), b'{"seed":1}\n'):  # the last: of an older version
        (tmp_path / name).write_bytes(each)
        with pytest.raises(ToolkitError, match=r"plan.json is damaged .* run the same build again"):
            read_record(target, name)
