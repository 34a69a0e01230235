"""Splits: fractions, seeds, and stability when a set grows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from shards.errors import UsageError
from shards.exclusions import read_excluded
from shards.planning.split import parse_fractions, read_groups, shuffled, split_of, split_of_source

FRACTIONS = parse_fractions("train=0.8,val=0.1,test=0.1")
KEYS = [f"ISIC_{number:07d}" for number in range(5000)]


def test_the_splits_have_about_their_fractions():
    count = Counter(split_of(key, FRACTIONS, 0) for key in KEYS)
    assert all(abs(count[name] / len(KEYS) - fraction) < 0.02 for name, fraction in FRACTIONS.items())


def test_the_seed_moves_groups_and_nothing_else_does():
    splits = [split_of(key, FRACTIONS, 0) for key in KEYS]
    assert splits == [split_of(key, dict(FRACTIONS), 0) for key in KEYS]
    assert splits != [split_of(key, FRACTIONS, 1) for key in KEYS]


def test_the_order_does_not_depend_on_the_order_given_and_survives_growth():
    order = shuffled(KEYS[:1000], 0)
    assert order == shuffled(reversed(KEYS[:1000]), 0)
    assert order != sorted(order)
    members = set(order)
    assert [key for key in shuffled(KEYS, 0) if key in members] == order


@pytest.mark.parametrize("text", ["train=0.8", "train=0.8,val=x", "train=0.5,train=0.5", "a b=1", "", "train=2,val=-1"])
def test_fractions_that_make_no_sense_are_refused(text: str):
    with pytest.raises(UsageError, match="--split"):
        parse_fractions(text)


def test_groups_are_read_by_the_known_id_column(tmp_path: Path):
    table = tmp_path / "metadata.csv"
    table.write_text("lesion_id,isic_id\nIL_1,A\nIL_1,B\nIL_2,C\n,D\n")
    assert read_groups(f"{table}:lesion_id", "ABDE") == {"A": "IL_1", "B": "IL_1"}


def test_ids_may_be_the_names_of_files_and_of_reduced_images(tmp_path: Path):
    table = tmp_path / "metadata.csv"
    table.write_text("image,lesion_id\nA.jpg,IL_1\nB_downsampled,IL_1\nC_downsampled.JPG,IL_2\n,\n,IL_3\n")
    assert read_groups(f"{table}:lesion_id", "ABC") == {"A": "IL_1", "B": "IL_1", "C": "IL_2"}
    assert read_excluded(table) >= set("ABC")


@pytest.mark.parametrize(
    ("spec", "words"),
    [("no.csv:lesion_id", "no such file"), ("lesion_id", "FILE.csv:COLUMN"), ("{}:x", "no column"), ("{}:id", "none")],
)
def test_groups_that_cannot_be_read_say_why(tmp_path: Path, spec: str, words: str):
    table = tmp_path / "metadata.csv"
    table.write_text("image,id\nA,1\n")
    with pytest.raises(UsageError, match=words):
        read_groups(spec.format(table), ["Z"])


def test_the_first_column_of_a_table_of_excel_is_found_and_an_id_counts_as_it_is_written(tmp_path: Path):
    table = tmp_path / "table.csv"
    table.write_text("lesion_id,image_id\nL1,A\nL2,A_downsampled\n", encoding="utf-8-sig")
    assert read_groups(f"{table}:lesion_id", ["A", "A_downsampled"]) == {"A": "L1", "A_downsampled": "L2"}


@pytest.mark.parametrize("name", ["ISIC2018_Input.zip", "Training_and_Validation.zip"])
def test_an_archive_whose_name_says_no_split_or_several_is_refused(name: str):
    assert split_of_source("https://host/ISIC2018_Task1-2_Validation_Input.zip") == "val"
    with pytest.raises(UsageError, match=f"--split-archives: the name of {name} says"):
        split_of_source(name)
