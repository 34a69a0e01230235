"""Builds: the same bytes for any number of workers, every input counted, and readable by webdataset."""

from __future__ import annotations

import csv
import gc
import io
import json
import shutil
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shards import format
from shards.build import build
from shards.errors import SourceError, ToolkitError, UsageError
from shards.format import Counts
from shards.inputs.decode import BadPairError, Decoded, load_pair
from shards.inputs.match import BadInputError, Pair, pair_files
from shards.inputs.source import open_sources
from shards.planning.plan import BuildOptions
from shards.reader import ShardSet
from shards.writing import encode, stages
from shards.writing.records import part_record_name, read_record, tar_name
from shards.writing.target import WORK, FolderTarget
from tests.shards.conftest import write_pair

SMALL = BuildOptions(size=32, samples_per_shard=7, split="train=0.6,val=0.2,test=0.2")


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="session")
def shard_set(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    out = tmp_path_factory.mktemp("sets") / "small"
    build(str(pictures), str(pictures), out, SMALL, workers=1)
    return ShardSet.open(out)


def test_every_pair_is_there_once_and_decodes_to_its_source(pictures: Path, shard_set: ShardSet):
    sources, files = open_sources([str(pictures)])
    expected = {pair.key: pair for pair in pair_files(files).pairs}
    seen = []
    for name in shard_set.index.splits:
        split = shard_set.split(name)
        for index in range(len(split)):
            key = split.key(index)
            decoded = load_pair(expected[key], sources, "stretch", 32)
            error = split.image(index).astype(int) - decoded.resize_plan.resize_image(decoded.picture)
            assert np.abs(error).mean() < 4  # 4:2:0 costs that much at 32 pixels; another image is 20 and more off
            np.testing.assert_array_equal(split.mask(index), decoded.resize_plan.resize_mask(decoded.mask))
            original = split.original_mask(index)
            if name == "train":
                assert original is None
            else:
                np.testing.assert_array_equal(original, np.asarray(decoded.mask) // 255)
            assert split.meta(index)["image"] == f"{key}.jpg"
            seen.append(key)
    assert sorted(seen) == sorted(expected)
    assert shard_set.index.counts == Counts(
        found=80, packed=80, rejected=0, ignored=0, duplicates={}, duplicates_across_splits=0
    )


@pytest.mark.parametrize("workers", [3, 6])  # each packs shards of its own; all encode for one that writes
def test_the_number_of_workers_changes_no_byte(pictures: Path, shard_set: ShardSet, tmp_path: Path, workers: int):
    build(str(pictures), str(pictures), tmp_path / "set", SMALL, workers=workers)
    assert content(tmp_path / "set") == content(shard_set.root)


def test_a_tar_is_plain_and_says_nothing_of_the_machine(shard_set: ShardSet):
    with tarfile.open(shard_set.root / "train/000000.tar", "r:") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            assert member.mode == 0o444


def test_a_plain_webdataset_recipe_sees_the_same_pairs(shard_set: ShardSet):
    from webdataset import WebDataset  # pyright: ignore[reportAttributeAccessIssue]  as its documentation does

    split = shard_set.split("val")
    urls = [str(shard_set.root / name) for name in split.shards]
    dataset = WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("__key__", "jpg", "mask.png")
    indices = {split.key(index): index for index in range(len(split))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files open
        samples = list(dataset)
        del dataset
        gc.collect()
    seen = set()
    for key, image, mask in samples:
        assert np.abs(np.asarray(image).astype(int) - split.image(indices[key])).max() <= 3
        np.testing.assert_array_equal(np.asarray(mask)[..., 0] // 255, split.mask(indices[key]))
        seen.add(key)
    assert seen == indices.keys()


def test_a_group_stays_in_one_split(pictures: Path, tmp_path: Path):
    table = tmp_path / "metadata.csv"
    table.write_text("isic_id,lesion_id\n" + "".join(f"ISIC_{n:07d},IL_{n // 4}\n" for n in range(40)))
    options = BuildOptions(size=32, split="train=0.5,val=0.5", groups=f"{table}:lesion_id")
    build(str(pictures), str(pictures), tmp_path / "set", options, workers=1)
    shard_set, where = ShardSet.open(tmp_path / "set"), {}
    for name in shard_set.index.splits:
        split = shard_set.split(name)
        for index in range(len(split)):
            assert where.setdefault(split.meta(index)["group"], name) == name
    assert len(where) == 10
    assert str(tmp_path) not in json.dumps(shard_set.index.to_json())


def test_an_image_is_a_duplicate_of_its_copy_although_only_one_of_their_masks_is_converted(
    pictures: Path, tmp_path: Path
):
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    first = sorted(folder.glob("*.jpg"))[0]
    shutil.copy(first, folder / "ISIC_0999999.jpg")
    with Image.open(folder / f"{first.stem}_segmentation.png") as mask:
        mask.convert("RGB").save(folder / "ISIC_0999999_segmentation.png")
    build(str(folder), str(folder), tmp_path / "set", BuildOptions(size="original", split="train=1"), workers=1)
    listed = (tmp_path / "set" / "duplicates.csv").read_text()
    assert f"ISIC_0999999,train,{first.stem},train,bytes,0\n" in listed


def test_size_original_copies_the_bytes(pictures: Path, tmp_path: Path):
    options = BuildOptions(size="original", split="train=1", original_masks="none")
    build(str(pictures), str(pictures), tmp_path / "set", options, workers=1)
    split = ShardSet.open(tmp_path / "set").split("train")
    for index in range(len(split)):
        assert split.read(index, format.IMAGE) == (pictures / f"{split.key(index)}.jpg").read_bytes()
        assert split.mask(index).shape == (60, 80)


@pytest.fixture
def flawed(pictures: Path, tmp_path: Path) -> Path:
    """Pairs with bad ones among them: a torn JPEG, a mask of another size, an image alone."""
    folder = tmp_path / "flawed"
    shutil.copytree(pictures, folder)
    torn = folder / "ISIC_0000003.jpg"
    torn.write_bytes(torn.read_bytes()[:-200])
    Image.new("L", (9, 9), 255).save(folder / "ISIC_0000005_segmentation.png")
    (folder / "ISIC_0000007_segmentation.png").unlink()
    (folder / "LICENSE.txt").write_text("CC-0")
    return folder


def test_fail_finds_all_bad_inputs_and_leaves_nothing(flawed: Path, tmp_path: Path):
    with pytest.raises(BadInputError) as caught:
        build(str(flawed), str(flawed), tmp_path / "a" / "b", SMALL, workers=2)
    reasons = {row.path: row.reason for row in caught.value.rejected}
    assert reasons == {
        "ISIC_0000003.jpg": "truncated",
        "ISIC_0000003_segmentation.png": "partner",
        "ISIC_0000005.jpg": "partner",
        "ISIC_0000005_segmentation.png": "size-mismatch",
        "ISIC_0000007.jpg": "no-mask",
    }
    assert not (tmp_path / "a").exists()


def test_fail_also_clears_a_set_whose_bad_input_only_packing_found(flawed: Path, tmp_path: Path):
    write_pair(flawed, "ISIC_0000007", 7)
    (tmp_path / "there").mkdir()
    with pytest.raises(BadInputError):
        build(str(flawed), str(flawed), tmp_path / "there", SMALL, workers=1)
    assert list((tmp_path / "there").iterdir()) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_skip_leaves_bad_inputs_out_and_lists_them(flawed: Path, tmp_path: Path, workers: int):
    options = BuildOptions(size=32, split=SMALL.split, on_bad_input="skip")
    index = build(str(flawed), str(flawed), tmp_path / "set", options, workers=workers).index
    counts = index.counts
    assert (counts.found, counts.packed, counts.rejected, counts.ignored) == (80, 74, 5, 1)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "set" / format.REJECTED_NAME).read_text())))
    assert [row["path"] for row in rows] == sorted(row["path"] for row in rows)
    assert len(rows) == 5
    assert sum(entry.samples for entry in index.splits.values()) == 37


def test_a_complete_set_is_left_alone_and_another_build_refused(pictures: Path, shard_set: ShardSet, tmp_path: Path):
    out = tmp_path / "set"
    shutil.copytree(shard_set.root, out)
    before = content(out)
    assert build(str(pictures), str(pictures), out, SMALL).already_complete
    other = BuildOptions(size=48, samples_per_shard=7, split=SMALL.split, seed=1)
    with pytest.raises(UsageError, match=r"seed \(0 there, 1 here\), size \(32 there, 48 here\)"):
        build(str(pictures), str(pictures), out, other)
    more = tmp_path / "more"
    write_pair(more, "ISIC_9", 9)
    with pytest.raises(UsageError, match="the input files"):
        build(str(pictures), str(more), out, SMALL)
    assert content(out) == before


def test_a_folder_with_other_files_is_refused(pictures: Path, tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds files that are no shard set"):
        build(str(pictures), str(pictures), tmp_path, SMALL)
    assert content(tmp_path) == {"thesis.txt": b"mine"}


def test_a_split_that_would_be_empty_is_refused(tmp_path: Path):
    write_pair(tmp_path / "in", "A", 1)
    with pytest.raises(SourceError, match="gets none of the 1 pairs"):
        build(str(tmp_path / "in"), str(tmp_path / "in"), tmp_path / "set", SMALL)
    assert not (tmp_path / "set").exists()


def test_a_given_split_of_bad_pairs_alone_is_refused(tmp_path: Path):
    for key in "ABC":
        write_pair(tmp_path / "in", key, ord(key))
    image = tmp_path / "in" / "A.jpg"
    image.write_bytes(image.read_bytes()[:100])
    (tmp_path / "splits.csv").write_text("id,split\nA,val\nB,train\nC,train\n")
    options = BuildOptions(size=32, split_file=str(tmp_path / "splits.csv"), on_bad_input="skip")
    with pytest.raises(SourceError, match="split val gets none of the 2 pairs; mend its images"):
        build(str(tmp_path / "in"), str(tmp_path / "in"), tmp_path / "set", options, workers=1)
    assert not (tmp_path / "set").exists()


def test_a_pair_that_cannot_be_read_a_second_time_stops_the_build_and_the_next_run_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "in"
    for number in range(24):  # each image twice: a duplicate moves to the split of the other, and is encoded again
        write_pair(folder, f"I{number:02d}", number % 12)
    options = BuildOptions(size=32, split="train=0.5,val=0.3,test=0.2", on_bad_input="skip")
    build(str(folder), str(folder), tmp_path / "whole", options, workers=1)
    read: set[str] = set()

    def fails_the_second_time(pair: Pair, *rest: Any) -> Decoded:
        if pair.key in read:
            raise BadPairError(pair.image, "unreadable", "[Errno 5] Input/output error")
        read.add(pair.key)
        return load_pair(pair, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(encode, "load_pair", fails_the_second_time)
        for _ in range(2):
            with pytest.raises(ToolkitError, match=r"I\d\d\.jpg: it was good .* unreadable now \(\[Errno 5\]"):
                build(str(folder), str(folder), tmp_path / "set", options, workers=1)
    build(str(folder), str(folder), tmp_path / "set", options, workers=1)
    assert content(tmp_path / "set") == content(tmp_path / "whole")


@pytest.mark.parametrize("victim", [0, 12])  # the one of a duplicate, and one of none
def test_a_pair_of_a_lost_part_that_cannot_be_read_any_more_stops_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: int
):
    folder, key = tmp_path / "in", f"I{victim:02d}"
    for number in range(16):
        write_pair(folder, f"I{number:02d}", number if number < 14 else number - 14)
    options = BuildOptions(size=32, split="train=0.5,val=0.5", samples_per_shard=3, on_bad_input="skip")
    build(str(folder), str(folder), tmp_path / "whole", options, workers=1)

    def stopped(*_: Any) -> None:
        raise ToolkitError("stopped")

    def unreadable(pair: Pair, *rest: Any) -> Decoded:
        if pair.key == key:
            raise BadPairError(pair.image, "unreadable", "[Errno 5] Input/output error")
        return load_pair(pair, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "write_shard", stopped)
        with pytest.raises(ToolkitError, match="stopped"):
            build(str(folder), str(folder), tmp_path / "set", options, workers=1)
    target = FolderTarget(tmp_path / "set")
    (part,) = (
        path.stem
        for path in (tmp_path / "set" / WORK).glob("0-*.json")
        if key in [sample["key"] for sample in read_record(target, part_record_name(path.stem))["samples"]]
    )
    target.delete([part_record_name(part), tar_name(part)])  # as a build does that finds it damaged
    with monkeypatch.context() as patch:
        patch.setattr(encode, "load_pair", unreadable)
        for _ in range(2):
            with pytest.raises(ToolkitError, match="was good when it was read before is bad now"):
                build(str(folder), str(folder), tmp_path / "set", options, workers=1)
    build(str(folder), str(folder), tmp_path / "set", options, workers=1)
    assert content(tmp_path / "set") == content(tmp_path / "whole")


def test_no_work_folder_is_left(shard_set: ShardSet):
    assert not (shard_set.root / WORK).exists()


def test_a_missing_mask_is_said_before_the_split_that_gets_nothing(tmp_path: Path):
    for key in ("A", "B"):
        write_pair(tmp_path / "in", key, seed=ord(key))
    (tmp_path / "in" / "B_segmentation.png").unlink()
    with pytest.raises(BadInputError) as caught:
        build(str(tmp_path / "in"), str(tmp_path / "in"), tmp_path / "out", SMALL)
    assert [row.reason for row in caught.value.rejected] == ["no-mask"]
    assert not (tmp_path / "out").exists()
