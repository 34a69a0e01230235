"""Parts are encoded once, and shards assembled from them, member for member."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest

from shards import format, layout
from shards.errors import ToolkitError
from shards.inputs.match import Pair, pair_files
from shards.inputs.source import Source, open_sources
from shards.planning.plan import BuildOptions, Part, PlannedShard
from shards.writing.job import Job
from shards.writing.records import ShardRecord, part_record_name, read_record, shard_record_name, tar_name
from shards.writing.staging import encode_part, write_shard
from shards.writing.target import WORK, FolderTarget
from tests.shards.conftest import write_pair

DECODED = BuildOptions(size=32)
COPIED = BuildOptions(size="original")


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[list[Source], tuple[Pair, ...]]:
    for number in range(4):
        write_pair(tmp_path / "in", f"I{number}", number)
    sources, files = open_sources([str(tmp_path / "in")])
    return sources, tuple(pair_files(files).pairs)


@pytest.fixture
def target(tmp_path: Path) -> FolderTarget:
    (tmp_path / "set" / WORK).mkdir(parents=True)
    return FolderTarget(tmp_path / "set")


def part_of(pairs: tuple[Pair, ...], name: str = "0-000000") -> Part:
    return Part(name, pairs, keep_original=True)


def shard_of(pairs: tuple[Pair, ...], split: str = "val") -> PlannedShard:
    return PlannedShard(split, 0, pairs)


def job_of(target: FolderTarget, sources: list[Source], options: BuildOptions) -> Job:
    return Job(target=target, sources=sources, options=options, identity={})


def written(shard: PlannedShard, parts: list[str], job: Job) -> ShardRecord:
    """Write a shard; the record that it leaves."""
    ticks: list[None] = []
    write_shard((shard, parts), job, lambda: ticks.append(None))
    assert len(ticks) == len(shard.pairs)
    return ShardRecord.from_json(read_record(job.target, shard_record_name(shard)))


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        files = {member.name: tar.extractfile(member) for member in tar}
        return {name: file.read() for name, file in files.items() if file}


def test_a_shard_takes_its_samples_from_several_parts_in_its_own_order(
    inputs: tuple[list[Source], tuple[Pair, ...]], target: FolderTarget
):
    sources, pairs = inputs
    ticks: list[None] = []
    for name, some in (("0-000000", pairs[:3]), ("0-000001", pairs[3:])):
        encode_part(part_of(some, name), job_of(target, sources, DECODED), lambda: ticks.append(None))
    assert len(ticks) == 4
    order, parts = (pairs[3], pairs[2], pairs[0]), ["0-000001", "0-000000", "0-000000"]
    record = written(shard_of(order), parts, job_of(target, sources, DECODED))
    staged = members(target.root / tar_name("0-000000")) | members(target.root / tar_name("0-000001"))
    shard = members(target.root / "val" / "000000.tar")
    assert list(shard) == [f"{pair.key}.{name}" for pair in order for name in format.MEMBERS]
    assert shard == {name: staged[name] for name in shard}
    data = (target.root / "val" / "000000.tar").read_bytes()
    assert record.entry.bytes == len(data)
    for row in record.rows:
        for name, (start, size) in zip(format.MEMBERS, layout.member_spans(row.offset, row.sizes), strict=True):
            assert data[start : start + size] == shard[f"{row.key}.{name}"]


def test_a_training_shard_leaves_out_the_original_masks_that_its_part_has(
    inputs: tuple[list[Source], tuple[Pair, ...]], target: FolderTarget
):
    sources, pairs = inputs
    encode_part(part_of(pairs), job_of(target, sources, DECODED), lambda: None)
    record = written(shard_of(pairs, "train"), ["0-000000"] * 4, job_of(target, sources, DECODED))
    assert not any(name.endswith(".original.png") for name in members(target.root / "train" / "000000.tar"))
    assert {(row.sizes[format.ORIGINAL], row.crcs[format.ORIGINAL]) for row in record.rows} == {(0, 0)}


def test_a_deferred_copy_is_in_the_record_alone_until_its_shard_reads_the_source(
    inputs: tuple[list[Source], tuple[Pair, ...]], target: FolderTarget, tmp_path: Path
):
    sources, pairs = inputs
    encode_part(part_of(pairs), job_of(target, sources, COPIED), lambda: None)
    assert not target.exists(tar_name("0-000000"))
    recorded = read_record(target, part_record_name("0-000000"))["samples"]
    assert [sample["offset"] for sample in recorded] == [None] * 4
    written(shard_of(pairs), ["0-000000"] * 4, job_of(target, sources, COPIED))
    shard = members(target.root / "val" / "000000.tar")
    assert shard["I2.jpg"] == (tmp_path / "in" / "I2.jpg").read_bytes()


@pytest.mark.parametrize("change", ["other bytes", "torn"])
def test_a_deferred_copy_whose_file_has_changed_is_named_and_no_shard_is_published(
    inputs: tuple[list[Source], tuple[Pair, ...]], target: FolderTarget, tmp_path: Path, change: str
):
    sources, pairs = inputs
    encode_part(part_of(pairs), job_of(target, sources, COPIED), lambda: None)
    image = tmp_path / "in" / "I2.jpg"
    if change == "torn":
        image.write_bytes(image.read_bytes()[:-50])
    else:
        shutil.copyfile(tmp_path / "in" / "I3.jpg", image)
    with pytest.raises(ToolkitError, match=r"I2\.jpg or its mask has changed during the build"):
        written(shard_of(pairs), ["0-000000"] * 4, job_of(target, sources, COPIED))
    assert not target.exists("val/000000.tar")


def test_bad_pairs_are_in_the_record_and_the_others_in_the_tar(
    inputs: tuple[list[Source], tuple[Pair, ...]], target: FolderTarget, tmp_path: Path
):
    sources, pairs = inputs
    (tmp_path / "in" / "I1.jpg").write_bytes(b"no picture")
    record = encode_part(part_of(pairs), job_of(target, sources, DECODED), lambda: None)
    assert [sample.key for sample in record.samples] == ["I0", "I2", "I3"]
    assert [(row.path, row.reason) for row in record.rejected] == [
        ("I1.jpg", "unreadable"),
        ("I1_segmentation.png", "partner"),
    ]
    assert "I1.jpg" not in members(target.root / tar_name("0-000000"))


def test_a_part_that_is_not_what_was_encoded_is_named_and_encoded_again(
    inputs: tuple[list[Source], tuple[Pair, ...]], target: FolderTarget
):
    """As when a disk has lost some of it after a crash."""
    sources, pairs = inputs
    job = job_of(target, sources, DECODED)
    encode_part(part_of(pairs), job, lambda: None)
    path = target.root / tar_name("0-000000")
    data = bytearray(path.read_bytes())
    data[layout.BLOCK + 30] ^= 1  # of the first image
    path.write_bytes(data)
    with pytest.raises(ToolkitError, match=r"0-000000\.tar is damaged \(I0 is not what was encoded\)"):
        write_shard((shard_of(pairs), ["0-000000"] * 4), job, lambda: None)
    assert not target.exists("val/000000.tar")
    assert not target.exists(tar_name("0-000000"))
    assert not target.exists(part_record_name("0-000000"))
