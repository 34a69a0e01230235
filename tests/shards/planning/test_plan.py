"""A lesion that was photographed more than once lies in one split, in a table laid out like that of HAM10000."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import pytest

from shards.inputs.match import Pair
from shards.inputs.source import File
from shards.planning.plan import BuildOptions, plan_shards, splits_by_hash
from shards.planning.split import read_groups
from shards.reader import ShardSet
from tests.shards.conftest import write_pair
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
    for name in shard_set.index["splits"]:
        split = shard_set.split(name)
        for number in range(len(split)):
            meta = split.meta(number)
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
    splits = splits_by_hash(lesions, groups, {}, options)
    pairs = [Pair(key, File(0, f"{key}.jpg", 1), File(0, f"{key}_segmentation.png", 1)) for key in lesions]
    where = defaultdict(set)
    for shard in plan_shards(pairs, splits, groups, options):
        for pair in shard.pairs:
            where[lesions[pair.key]].add(shard.split)
    assert sum(len(names) == 1 for names in where.values()) == len(set(lesions.values()))
