"""Tables of images to exclude: what they say, what a build leaves out for them, and how it says so."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from shards.build import BuildOptions, build
from shards.console import print_build
from shards.errors import UsageError
from shards.exclusions import read_excluded
from shards.reader import ShardSet


def table(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_verdict_wrong_excludes_and_a_table_without_verdicts_excludes_all(tmp_path):
    review = table(tmp_path / "review.csv", "rank,id,verdict\n1,a,wrong\n2,b,keep\n3,c,unsure\n4,d,\n5,e,wrong\n")
    assert read_excluded(review) == {"a", "e"}
    assert read_excluded(table(tmp_path / "list.csv", "id\na\nb\n")) == {"a", "b"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,verdict\na,keep\n", "it excludes no image"),
        ("id,verdict\na,bad\n", "verdict 'bad' of a; write keep, wrong, unsure or nothing"),
        ("id,verdict\na,keep\na,wrong\n", "a has two values, 'keep' and 'wrong'"),
        ("id\n", "it excludes no image"),
        ("", "it is empty"),
        ("\udcff", "not a CSV file in UTF-8"),
    ],
)
def test_a_table_that_is_none_is_refused(text, message, tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UsageError, match=message):
        read_excluded(path)
    with pytest.raises(UsageError, match="there is no such file"):
        read_excluded(tmp_path / "none.csv")


def test_a_build_leaves_the_excluded_pairs_out_counts_and_lists_them(archive, shard_set, tmp_path, capsys):
    whole = ShardSet.open(shard_set)
    options = BuildOptions(size=64, samples_per_shard=7, split="train=0.6,val=0.2,test=0.2")
    keys = {
        name: [whole.split(name).key(index) for index in range(len(whole.split(name)))] for name in whole.index.splits
    }
    excluded = [keys["train"][0], keys["val"][1]]
    path = table(tmp_path / "review.csv", "id,verdict\n" + "".join(f"{key},wrong\n" for key in excluded))
    sources = (str(archive[0]), str(archive[1]))
    result = build(*sources, tmp_path / "set", replace(options, exclude=str(path)))
    index = result.index
    print_build(result)
    assert "leaves out 2 images, by the split they would be in: train 1, val 1\n" in capsys.readouterr().out
    remaining = {name: [key for key in keys[name] if key not in excluded] for name in keys}
    built = ShardSet.open(tmp_path / "set")
    for name, expected in remaining.items():
        assert sorted(built.split(name).key(number) for number in range(len(expected))) == sorted(expected)
    assert index.counts.reasons["excluded"] == 4
    assert index.counts.found == index.counts.packed + index.counts.rejected + index.counts.ignored
    with (tmp_path / "set" / "rejected.csv").open(newline="") as file:
        listed = [row for row in csv.DictReader(file) if row["reason"] == "excluded"]
    assert {row["detail"] for row in listed} == {"named by review.csv"}
    assert len(index.built["exclude"]) == 64
    assert "exclude" not in whole.index.built

    again = build(*sources, tmp_path / "set", replace(options, exclude=str(path)))
    assert again.already_complete
    with pytest.raises(UsageError, match="holds another build; it differs in exclude"):
        build(*sources, tmp_path / "set", options)
    for name, message in (
        ("ISIC_9", "it names none of the images"),
        ("\n".join(key for split in keys.values() for key in split), "names all"),
    ):
        other = table(tmp_path / "other.csv", f"id\n{name}\n")
        with pytest.raises(UsageError, match=message):
            build(*sources, tmp_path / "other", replace(options, exclude=str(other)))
        assert not (tmp_path / "other").exists()


def test_excluded_images_are_counted_by_group_and_by_split_file_as_far_as_it_names_them(pictures, tmp_path, capsys):
    keys = [f"ISIC_{number:07d}" for number in range(40)]
    excluded = keys[:3]
    path = table(tmp_path / "list.csv", "id\n" + "\n".join(excluded))
    sources, options = (
        (str(pictures), str(pictures)),
        BuildOptions(size=32, split="train=0.5,val=0.5", exclude=str(path)),
    )
    groups = table(tmp_path / "groups.csv", "id,lesion\n" + "".join(f"{key},L\n" for key in keys[:4]))
    result = build(*sources, tmp_path / "grouped", replace(options, groups=f"{groups}:lesion"), workers=1)
    (split,) = result.excluded  # of the group
    shards = ShardSet.open(tmp_path / "grouped").split(split)
    assert keys[3] in [shards.key(index) for index in range(len(shards))]
    assert (result.excluded, result.grouped) == ({split: 3}, 1)

    given = "id,split\n" + "".join(f"{key},{'val' if key < keys[9] else 'train'}\n" for key in keys[1:])
    options = replace(options, split=BuildOptions.split, split_file=str(table(tmp_path / "splits.csv", given)))
    print_build(build(*sources, tmp_path / "given", options, workers=1))
    assert (
        "leaves out 3 images, by the split they would be in: val 2, 1 not in the --split-file"
        in capsys.readouterr().out
    )
