"""The plan of a build; and lesions with several images, in a table laid out like that of HAM10000."""

from __future__ import annotations

import csv
import itertools
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shards.errors import SourceError, UsageError
from shards.inputs.match import Pair
from shards.inputs.source import File
from shards.planning.plan import (
    MAX_PART_PAIRS,
    BuildOptions,
    check_groups,
    check_not_empty,
    digest_of_files,
    plan_shards,
    split_into_parts,
    split_warnings,
    splits_by_hash,
)
from shards.planning.split import read_groups
from shards.reader import ShardSet
from tests.shards.conftest import pair_of, write_pair
from tests.shards.test_cli import run

COLUMNS = ("isic_id", "attribution", "age_approx", "diagnosis_1", "lesion_id", "sex")


def table_of(path: Path, lesions: dict[str, str]) -> Path:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows([key, "nobody, nowhere", 45, "", lesion, "male"] for key, lesion in lesions.items())
    return path


def test_a_lesion_of_several_images_is_in_one_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lesions = {f"ISIC_{n:07d}": f"IL_{n // 3}" for n in range(60)}
    for n, key in enumerate(lesions):
        write_pair(tmp_path / "in", key, n)
    table = table_of(tmp_path / "metadata.csv", {**lesions, "ISIC_9999999": "IL_of_another_set"})
    options = ("--size", "32", "--split", "train=0.5,val=0.3,test=0.2", "--seed", "2", "--workers", "1")
    sources = ("--images", tmp_path / "in", "--masks", tmp_path / "in")
    assert run("build", *sources, "--out", tmp_path / "set", "--groups", f"{table}:lesion_id", *options) == 0
    shard_set, where = ShardSet.open(tmp_path / "set"), defaultdict(set)
    for name in shard_set.index.splits:
        split = shard_set.split(name)
        for index in range(len(split)):
            meta = split.meta(index)
            assert meta["group"] == lesions[meta["key"]]
            where[meta["group"]].add(name)
    assert len(where) == 20
    assert all(len(names) == 1 for names in where.values())
    capsys.readouterr()
    assert run("info", tmp_path / "set") == 0
    assert "groups lesion_id" in capsys.readouterr().out


@pytest.mark.real
def test_no_lesion_of_ham10000_is_in_two_splits(real_data: Path):
    with (real_data / "HAM10000_metadata.csv").open(newline="", encoding="utf-8-sig") as file:
        lesions = {row["isic_id"]: row["lesion_id"] for row in csv.DictReader(file)}
    groups = read_groups(f"{real_data / 'HAM10000_metadata.csv'}:lesion_id", lesions)
    assert groups == lesions
    options = BuildOptions()
    pairs = [pair_of(key, groups[key]) for key in lesions]
    where = defaultdict(set)
    for shard in plan_shards(pairs, splits_by_hash(pairs, {}, options), options):
        for pair in shard.pairs:
            where[lesions[pair.key]].add(shard.split)
    assert sum(len(names) == 1 for names in where.values()) == len(set(lesions.values()))


def pairs_of(count: int) -> list[Pair]:
    return [pair_of(f"ISIC_{n:07d}") for n in range(count)]


def test_the_shards_hold_every_pair_once_and_only_the_last_of_a_split_is_not_full():
    pairs, options = pairs_of(500), BuildOptions(samples_per_shard=32)
    splits = splits_by_hash(pairs, {}, options)
    shards = plan_shards(reversed(pairs), splits, options)
    assert shards == plan_shards(pairs, splits, options)
    packed = [(pair.key, shard.split) for shard in shards for pair in shard.pairs]
    assert sorted(packed) == sorted(splits.items())
    assert list(dict.fromkeys(shard.split for shard in shards)) == ["train", "val", "test"]
    for shard, following in itertools.pairwise(shards):
        if shard.split == following.split:
            assert (len(shard.pairs), following.number) == (32, shard.number + 1)
        else:
            assert following.number == 0


def test_the_parts_repeat_the_shards_and_get_smaller():
    pairs, options = pairs_of(3000), BuildOptions(original_masks="eval")
    shards = plan_shards(pairs, splits_by_hash(pairs, {}, options), options)
    parts = split_into_parts(shards, options, encoding_pass=1)
    assert [pair for part in parts for pair in part.pairs] == [pair for shard in shards for pair in shard.pairs]
    split_of = {pair.key: shard.split for shard in shards for pair in shard.pairs}
    for part in parts:
        assert {split_of[pair.key] != "train" for pair in part.pairs} == {part.keep_original}
    assert len({part.name for part in parts}) == len(parts)
    assert all(part.name.startswith("1-") for part in parts)
    assert len(parts[0].pairs) == MAX_PART_PAIRS
    assert [len(part.pairs) for part in parts[-3:]] == [1, 1, 1]


def test_the_digest_is_of_names_sizes_checksums_and_only_if_asked_of_times():
    files = [File(0, "a.jpg", 5, crc=1, changed=10), File(1, "b.png", 6)]
    touched = [File(0, "a.jpg", 5, crc=1, changed=11), File(1, "b.png", 6)]
    assert digest_of_files(files, with_times=False) == digest_of_files(touched, with_times=False)
    assert digest_of_files(files, with_times=True) != digest_of_files(touched, with_times=True)
    for other in (File(0, "a.jpg", 5, crc=2), File(0, "a.jpg", 4, crc=1), File(0, "c.jpg", 5, crc=1)):
        assert digest_of_files([other, files[1]], with_times=False) != digest_of_files(files, with_times=False)


def test_a_group_or_a_split_that_is_too_large_or_small_is_warned_of():
    options = BuildOptions(split="train=0.6,val=0.2,test=0.2", groups="metadata.csv:patient_id")
    pairs = [pair_of(str(number), "unknown" if number % 2 else f"P{number}") for number in range(60)]
    splits = splits_by_hash(pairs, {}, options)
    (line,) = split_warnings(pairs, splits, options)
    assert line.startswith("--groups: 30 of the 60 images have patient_id 'unknown', and so are in one split; ")
    alone = replace(options, groups=None)
    assert not split_warnings(pairs, splits, alone)  # no split should have 20 but train, which has 51
    twice = [pair_of(str(number), "no" if number % 2 else "yes") for number in range(42)]
    (line, *_) = split_warnings(twice, splits_by_hash(twice, {}, options), options)
    assert "21 of the 42 images have patient_id 'yes' (the largest of 2 large groups), and so are in one split" in line

    many = pairs_of(1000)
    even = splits_by_hash(many, {}, options)
    assert not split_warnings(many, even, options)
    patients = [pair_of(str(number), str(number // 50)) for number in range(1000)]  # of 50, no more than 5 %
    assert not split_warnings(patients, {pair.key: even[many[n].key] for n, pair in enumerate(patients)}, options)
    numbers = {"train": 540, "val": 410, "test": 50}
    names = [name for name, number in numbers.items() for _ in range(number)]
    more, less = split_warnings(many, dict(zip((pair.key for pair in many), names, strict=True)), alone)
    assert more.startswith("split val has 410 of the 1000 images, not about 200 (")
    assert less.startswith("split test has 50 of the 1000 images, not about 200 (")


def test_few_images_are_not_warned_of():
    options = BuildOptions(groups="metadata.csv:patient_id")
    pairs = [pair_of(str(number), "one" if number < 20 else "two") for number in range(40)]
    assert not split_warnings(pairs, dict.fromkeys((pair.key for pair in pairs), "train"), options)


def test_an_empty_split_and_a_torn_group_are_named():
    options = BuildOptions(split="train=0.5,val=0.5")
    check_not_empty([], {"A": "train", "B": "val"}, options, {})
    with pytest.raises(SourceError, match="split val gets none of the 2 pairs; give more images"):
        check_not_empty([], {"A": "train", "B": "train"}, options, {})
    with pytest.raises(SourceError, match="split test gets none of the 1 pairs; mend its images"):
        check_not_empty([], {"A": "train"}, options, {"A": "train", "B": "test"})
    unknown = [pair_of(str(number), "unknown") for number in range(24)]
    grouped = BuildOptions(split="train=0.5,val=0.5", groups="metadata.csv:lesion_id")
    with pytest.raises(SourceError, match="split val gets none of the 24 pairs; --groups: 24 of the 24 images"):
        check_not_empty(unknown, dict.fromkeys((pair.key for pair in unknown), "train"), grouped, {})
    pairs = [pair_of("A"), pair_of("B", "IL_1"), pair_of("C", "IL_1")]
    check_groups(pairs, {"A": "train", "B": "val", "C": "val"}, options)
    with pytest.raises(UsageError, match=r"group IL_1 is in two splits \(B in train, C in val\)"):
        check_groups(pairs, {"A": "train", "B": "train", "C": "val"}, options)
    archives = BuildOptions(split_archives=True)
    with pytest.raises(SourceError, match=r"or leave out its archive$"):
        check_not_empty([], {"A": "train"}, archives, {"A": "train", "B": "test"})
    with pytest.raises(UsageError, match=r"--split-archives: group IL_1 is in two splits .*; give a --split-file"):
        check_groups(pairs, {"A": "train", "B": "train", "C": "val"}, archives)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 15}, "--size 15: give 16 to 8192 pixels"),
        ({"size": 8193}, "--size 8193"),
        ({"size": None}, "--size None: give 16 to 8192 pixels, or original"),
        ({"samples_per_shard": 0}, "--samples-per-shard 0: give 1 or more"),
        ({"fit": "squeeze"}, "--fit squeeze: give stretch, pad, crop"),
        ({"mask_suffix": ""}, "--mask-suffix"),
        ({"split": "train=0.5"}, "--split train=0.5"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], words: str):
    with pytest.raises(UsageError, match=words):
        BuildOptions(**options)


def test_the_recorded_options_name_no_path_and_change_with_the_tables(tmp_path: Path):
    (tmp_path / "groups.csv").write_text("id,patient\nA,1\n")
    (tmp_path / "splits.csv").write_text("id,split\nA,train\n")
    options = BuildOptions(groups=f"{tmp_path}/groups.csv:patient", split_file=f"{tmp_path}/splits.csv")
    recorded = options.to_json()
    assert str(tmp_path) not in str(recorded)
    assert recorded["groups"]["column"] == "patient"
    assert recorded["split"].startswith("file ")
    (tmp_path / "groups.csv").write_text("id,patient\nA,2\n")
    (tmp_path / "splits.csv").write_text("id,split\nA,val\n")
    changed = options.to_json()
    assert {name for name in recorded if recorded[name] != changed[name]} == {"groups", "split"}
    recorded = BuildOptions(size="original").to_json()
    assert (recorded["fit"], recorded["size"]) == ("original", None)


def test_the_order_in_the_shards_depends_on_the_seed():
    pairs = [Pair(f"ISIC_{i}", File(0, f"{i}.jpg", 1), File(0, f"{i}.png", 1), f"ISIC_{i}") for i in range(20)]
    splits = dict.fromkeys((pair.key for pair in pairs), "train")
    orders = [
        [pair.key for shard in plan_shards(pairs, splits, BuildOptions(seed=seed)) for pair in shard.pairs]
        for seed in (0, 1)
    ]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(splits)
