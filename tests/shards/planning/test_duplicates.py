"""Duplicates: found by bytes, pixels and perceptual hash, listed, and assigned to one split."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from shards import format
from shards.build import build
from shards.errors import UsageError
from shards.inputs.decode import load_pair
from shards.inputs.match import pair_files
from shards.inputs.source import open_sources
from shards.planning.duplicates import MAX_DISTANCE, Duplicate, hash_of, merge_groups, near_pairs, perceptual_hash
from shards.planning.plan import BuildOptions, splits_by_hash
from shards.reader import ShardSet
from shards.verify import verify
from tests.shards.conftest import write_pair

HALVES = BuildOptions(size=32, split="train=0.5,val=0.5")


def splits_of(root: Path) -> dict[str, str]:
    shard_set = ShardSet.open(root)
    return {
        split.key(index): name
        for name in shard_set.index.splits
        for split in [shard_set.split(name)]
        for index in range(len(split))
    }


def copy_pair(folder: Path, key: str, new: str) -> None:
    shutil.copy(folder / f"{key}.jpg", folder / f"{new}.jpg")
    shutil.copy(folder / f"{key}_segmentation.png", folder / f"{new}_segmentation.png")


@pytest.fixture(scope="module")
def doubled(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """41 pairs, and one of them copied (Z_bytes), one stored as PNG (Z_pixels), one recoloured and reduced (Z_near)."""
    folder = Path(shutil.copytree(pictures, tmp_path_factory.mktemp("doubled") / "in"))
    copy_pair(folder, "ISIC_0000003", "Z_bytes")
    copy_pair(folder, "ISIC_0000004", "Z_pixels")
    with Image.open(folder / "Z_pixels.jpg") as picture:
        picture.save(folder / "Z_pixels.png")
    (folder / "Z_pixels.jpg").unlink()
    write_pair(folder, "ISIC_0000040", 40)
    detailed = np.random.default_rng(40).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(detailed).resize((80, 60)).save(folder / "ISIC_0000040.jpg", quality=95)
    copy_pair(folder, "ISIC_0000040", "Z_near")
    with Image.open(folder / "ISIC_0000040.jpg") as picture:
        picture = ImageEnhance.Color(ImageEnhance.Brightness(picture).enhance(0.9)).enhance(0.5)
        picture.resize((64, 48)).save(folder / "Z_near.jpg", quality=90)
    with Image.open(folder / "Z_near_segmentation.png") as mask:
        mask.resize((64, 48)).save(folder / "Z_near_segmentation.png")
    return folder


def test_duplicates_are_found_listed_and_kept_in_one_split(doubled: Path, tmp_path: Path):
    seen, moved = set(), set()
    for seed in range(4):
        out = tmp_path / f"set{seed}"
        options = BuildOptions(size=32, split=HALVES.split, seed=seed)
        counts = build(str(doubled), str(doubled), out, options, workers=2).index.counts
        assert counts.duplicates == {"bytes": 1, "near": 1, "pixels": 1}, seed
        assert counts.duplicates_across_splits == 0
        rows = list(csv.DictReader(io.StringIO((out / format.DUPLICATES_NAME).read_text())))
        assert [(row["key"], row["duplicate_of"], row["same"]) for row in rows] == [
            ("Z_bytes", "ISIC_0000003", "bytes"),
            ("Z_near", "ISIC_0000040", "near"),
            ("Z_pixels", "ISIC_0000004", "pixels"),
        ]
        splits = splits_of(out)
        for row in rows:
            assert splits[row["key"]] == row["split"] == row["split_of_that"] == splits[row["duplicate_of"]]
        seen.update(splits[row["key"]] for row in rows)
        assert verify(out, deep=True).faults == []
        alone = splits_by_hash(splits, {}, {}, options)
        for name in ("train", "val"):
            split = ShardSet.open(out).split(name)
            assert {split.original_mask(index) is None for index in range(len(split))} == {name == "train"}
        moved |= {(alone[key], split) for key, split in splits.items() if split != alone[key]}
    assert seen == {"train", "val"}
    assert moved == {("train", "val"), ("val", "train")}  # both were encoded for the other split at first


def test_a_set_that_grows_by_duplicates_moves_no_image(pictures: Path, doubled: Path, tmp_path: Path):
    build(str(pictures), str(pictures), tmp_path / "small", HALVES, workers=1)
    build(str(doubled), str(doubled), tmp_path / "grown", HALVES, workers=1)
    small, grown = splits_of(tmp_path / "small"), splits_of(tmp_path / "grown")
    assert len(grown) == len(small) + 4
    assert {key: grown[key] for key in small} == small


def test_a_chain_of_duplicates_and_groups_is_one():
    chain = [Duplicate("C", "B", "near", 5), Duplicate("E", "D", "near", 5), Duplicate("D", "C", "near", 5)]
    groups = {"E": "A_lesion", "X": "A_lesion"}
    names = merge_groups(groups, chain)
    assert {names.get(group, group) for group in ("B", "C", "D", "A_lesion")} == {"A_lesion"}
    assert merge_groups(groups, reversed(chain)) == names
    assert merge_groups({}, []) == {}


def test_near_pairs_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    table = rng.integers(0, 256, (300, 32), dtype=np.uint8)
    for row in range(100, 300):  # variants of the first hundred, and of one another
        flipped = np.packbits(rng.random(256) < rng.choice([0, 0.05, 0.15]))
        table[row] = table[rng.integers(0, row)] ^ flipped
    unique, first = np.unique(table, axis=0, return_index=True)
    words = unique.view(np.uint16)
    expected = set()
    for a in range(len(unique)):
        for b in range(a + 1, len(unique)):
            distance = int(np.bitwise_count(unique[a] ^ unique[b]).sum())
            if distance <= MAX_DISTANCE and (words[a] == words[b]).any():
                expected.add((int(min(first[a], first[b])), int(max(first[a], first[b])), distance))
    found = near_pairs(table)
    assert {pair for pair in found if pair[2]} == expected
    assert len(expected) > 50
    same = [(i, j) for i, j, distance in found if not distance]
    assert len(same) == len(table) - len(unique)
    assert all((table[i] == table[j]).all() for i, j in same)
    assert found == sorted(found)


def test_no_hashes_have_no_near_pairs():
    assert near_pairs(np.zeros((0, 32), np.uint8)) == []
    assert near_pairs(np.zeros((1, 32), np.uint8)) == []


def test_the_hash_is_the_same_on_every_machine():
    y, x = np.mgrid[:32, :32]
    grey = ((x * x * 3 + y * 7 + x * y) % 251).astype(np.uint8)
    assert hash_of(grey).hex() == ("00005112d29b7afc5e31a0c9d124904391813e4c7373ca5aeb7b9f8ace61d012")


@pytest.mark.real
def test_of_the_real_set_twenty_pairs_are_found_and_no_false_one(real_data: Path):
    archives = ("ISIC2018_Task1-2_Training_Input_256.zip", "ISIC2018_Task1_Training_GroundTruth_256.zip")
    sources, files = open_sources(str(real_data / name) for name in archives)
    pairs = pair_files(files).pairs
    decoded = (load_pair(pair, sources, "stretch", 128) for pair in pairs)
    pictures = (each.resize_plan.resize_content(each.picture) for each in decoded)  # as a build does
    table = np.frombuffer(b"".join(map(perceptual_hash, pictures)), np.uint8)
    found = {(pairs[i].key, pairs[j].key) for i, j, _ in near_pairs(table.reshape(-1, 32))}
    for source in sources:
        source.close()
    assert len(found) == 20
    # Looked at: each is one photograph twice, the same or recoloured.
    assert {("ISIC_0012290", "ISIC_0013594"), ("ISIC_0000193", "ISIC_0015436")} <= found


def write_table(path: Path, splits: dict[str, str]) -> str:
    path.write_text("id,split\n" + "".join(f"{key},{split}\n" for key, split in splits.items()))
    return str(path)


def test_a_split_file_wins_and_duplicates_that_it_tears_apart_are_counted(doubled: Path, tmp_path: Path):
    _, files = open_sources([str(doubled)])
    keys = [pair.key for pair in pair_files(files).pairs]
    given = {key: ("holdout" if key.startswith("Z") else "train") for key in keys}
    options = BuildOptions(size=32, split_file=write_table(tmp_path / "splits.csv", {**given, "other": "val"}))
    index = build(str(doubled), str(doubled), tmp_path / "set", options, workers=1).index
    assert splits_of(tmp_path / "set") == given
    assert index.counts.duplicates_across_splits == 3
    assert str(tmp_path) not in json.dumps(index.to_json())


def test_a_split_file_that_cannot_be_followed_is_refused(tmp_path: Path):
    folder = tmp_path / "in"
    for number in range(4):
        write_pair(folder, f"I{number}", number)
    given = {f"I{number}": ("train", "val")[number % 2] for number in range(4)}

    def refused(splits: dict[str, str], match: str, groups: str | None = None) -> None:
        options = BuildOptions(size=32, split_file=write_table(tmp_path / "splits.csv", splits), groups=groups)
        with pytest.raises(UsageError, match=match):
            build(str(folder), str(folder), tmp_path / "set", options, workers=1)
        assert not (tmp_path / "set").exists()

    refused({"I0": "train", "I1": "val"}, r"no split for 2 of the 4 images \(first: I2\)")
    refused({**given, "I3": "../out"}, r"I3 has split '\.\./out'")
    (tmp_path / "groups.csv").write_text("id,patient\nI0,P\nI1,P\n")
    groups = f"{tmp_path / 'groups.csv'}:patient"
    refused(given, r"group P is in two splits \(I0 in train, I1 in val\)", groups)
    with pytest.raises(UsageError, match="give one of the two"):
        BuildOptions(split="train=1", split_file="splits.csv")
