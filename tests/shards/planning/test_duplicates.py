"""Duplicates: found by bytes, pixels and perceptual hash, listed, and assigned to one split."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards import format
from shards.build import build
from shards.errors import UsageError
from shards.inputs.decode import load_pair
from shards.inputs.match import pair_files
from shards.inputs.source import open_sources
from shards.planning.duplicates import (
    HASH_BYTES,
    MAX_DISTANCE,
    WORDS,
    Duplicate,
    bytes_hash,
    hash_of,
    kind_of,
    merge_groups,
    near_pairs,
    perceptual_hash,
    same_photograph,
)
from shards.planning.plan import BuildOptions, splits_by_hash
from shards.reader import ShardSet
from shards.verify import verify
from tests.shards.conftest import pair_of, write_pair

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


def photograph(seed: int, *, circle: bool = False) -> Image.Image:
    """A lesion on skin with pores and hairs; `circle`: as a dermatoscope shows it, dark outside of a circle."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1:1:192j, -1:1:256j]
    lesion = ((x - rng.uniform(-0.2, 0.2)) ** 2 + (y - rng.uniform(-0.2, 0.2)) ** 2 < rng.uniform(0.1, 0.3))[..., None]
    pores = np.asarray(Image.fromarray(rng.integers(0, 60, (64, 86), dtype=np.uint8)).resize((256, 192)))[..., None]
    colours = np.where(lesion, (120, 70, 50), (210, 160, 150)) + pores - 30
    if circle:
        colours = colours * np.clip(6 * (1 - np.hypot(x, y)), 0, 1)[..., None]
    return Image.fromarray(np.clip(colours, 0, 255).astype(np.uint8))


def changed(picture: Image.Image) -> Image.Image:
    """The same photograph: cropped by a few percent, another colour, half of the size, a worse JPEG."""
    width, height = picture.size
    picture = picture.crop((round(0.02 * width), round(0.01 * height), round(0.97 * width), round(0.98 * height)))
    colours = 255 * (np.asarray(picture) / 255) ** (1.4, 0.8, 0.7) * (0.9, 0.8, 1)
    file = io.BytesIO()
    Image.fromarray(colours.astype(np.uint8)).resize((128, 96)).save(file, "JPEG", quality=70)
    return Image.open(file)


def write_picture(folder: Path, key: str, picture: Image.Image) -> None:
    """Write a pair whose mask is a rectangle."""
    picture.save(folder / f"{key}.jpg", quality=95)
    mask = np.zeros(picture.size[::-1], np.uint8)
    mask[10:30, 20:40] = 255
    Image.fromarray(mask).save(folder / f"{key}_segmentation.png")


@pytest.fixture(scope="module")
def doubled(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """41 pairs, and one of them copied (Z_bytes), one stored as PNG (Z_pixels), one recoloured and more (Z_near)."""
    folder = Path(shutil.copytree(pictures, tmp_path_factory.mktemp("doubled") / "in"))
    copy_pair(folder, "ISIC_0000003", "Z_bytes")
    copy_pair(folder, "ISIC_0000004", "Z_pixels")
    with Image.open(folder / "Z_pixels.jpg") as picture:
        picture.save(folder / "Z_pixels.png")
    (folder / "Z_pixels.jpg").unlink()
    write_picture(folder, "ISIC_0000040", photograph(40))
    write_picture(folder, "Z_near", changed(photograph(40)))
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
        alone = splits_by_hash(map(pair_of, splits), {}, options)
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
    table = rng.integers(0, 256, (300, HASH_BYTES), dtype=np.uint8)
    for row in range(100, 300):  # variants of the first hundred, and of one another
        flipped = np.packbits(rng.random(8 * HASH_BYTES) < rng.choice([0, 0.05, 0.15, 0.25]))
        table[row] = table[rng.integers(0, row)] ^ flipped
    unique, first = np.unique(table, axis=0, return_index=True)
    words = np.unpackbits(unique, axis=1)[:, WORDS]  # (u, 64, 16)
    expected, without_words = set(), 0
    for a in range(len(unique)):
        for b in range(a + 1, len(unique)):
            distance = int(np.bitwise_count(unique[a] ^ unique[b]).sum())
            if distance <= MAX_DISTANCE and (words[a] == words[b]).all(axis=1).any():
                expected.add((int(min(first[a], first[b])), int(max(first[a], first[b])), distance))
            without_words += distance <= MAX_DISTANCE
    found = near_pairs(table)
    assert {pair for pair in found if pair[2]} == expected
    assert 50 < len(expected) < without_words
    same = [(i, j) for i, j, distance in found if not distance]
    assert len(same) == len(table) - len(unique)
    assert all((table[i] == table[j]).all() for i, j in same)
    assert found == sorted(found)


def test_no_hashes_have_no_near_pairs():
    assert near_pairs(np.zeros((0, HASH_BYTES), np.uint8)) == []
    assert near_pairs(np.zeros((1, HASH_BYTES), np.uint8)) == []


def test_a_word_has_sixteen_different_bits_and_every_bit_is_in_a_word():
    assert all(len(set(word)) == 16 for word in WORDS.tolist())
    assert set(WORDS.ravel().tolist()) == set(range(8 * HASH_BYTES))


def test_the_hash_is_the_same_on_every_machine():
    y, x = np.mgrid[:32, :32]
    channel = ((x * x * 3 + y * 7 + x * y) % 251).astype(np.uint8)
    assert hash_of(channel).hex() == "00005112d29b7afc5e31a0cdd1249043"
    assert hash_of(channel // 2 + 20) == hash_of(channel // 2)


@pytest.mark.parametrize("circle", [False, True])
def test_one_photograph_is_the_same_however_it_was_changed_and_another_is_not(circle: bool):
    pictures = [photograph(seed, circle=circle) for seed in range(6)]
    for number, picture in enumerate(pictures):
        assert same_photograph(picture, changed(picture))
        assert same_photograph(changed(picture), picture)
        assert not any(same_photograph(picture, other) for other in pictures[:number])
        assert not same_photograph(picture, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT))


def test_a_picture_without_any_texture_is_like_no_other():
    plain = Image.new("RGB", (64, 48), (200, 150, 140))
    assert not same_photograph(plain, plain)
    assert not same_photograph(plain, photograph(0))


def test_images_that_look_alike_from_afar_are_no_duplicates(tmp_path: Path):
    lesion = np.asarray(photograph(0).resize((16, 12)).resize((256, 192)))
    hashes = []
    for seed, key in enumerate(("first", "second")):
        grain = np.random.default_rng(seed).integers(-20, 20, lesion.shape)
        picture = Image.fromarray(np.clip(lesion + grain, 0, 255).astype(np.uint8))
        write_picture(tmp_path, key, picture)
        hashes.append(perceptual_hash(picture))
    assert near_pairs(np.frombuffer(b"".join(hashes), np.uint8).reshape(2, HASH_BYTES))
    options = BuildOptions(size=32, split="train=1")
    assert build(str(tmp_path), str(tmp_path), tmp_path / "set", options, workers=1).index.counts.duplicates == {}


# Looked at one by one: each is one photograph twice, or (0001134, 0015945) two of one lesion, taken within moments.
ISIC_2018 = """
0000157 0014946, 0000162 0014826, 0000164 0014795, 0000165 0014788, 0000171 0015124, 0000173 0015110, 0000177 0014657,
0000179 0014765, 0000182 0015395, 0000183 0015311, 0000184 0015310, 0000185 0015155, 0000186 0014698, 0000193 0015436,
0000201 0015023, 0000204 0014748, 0000205 0014742, 0000206 0014739, 0000209 0015016, 0000215 0015313, 0000217 0014973,
0000218 0015241, 0000220 0015202, 0000222 0014846, 0000223 0014818, 0000224 0014791, 0000225 0014778, 0000226 0014949,
0000227 0015034, 0000229 0014771, 0000230 0014763, 0000519 0011295, 0001134 0010016, 0012222 0016003, 0012290 0013594,
0012672 0012673, 0012756 0013184, 0012887 0012989, 0013109 0013163, 0015945 0015946, 0015986 0015987
"""


@pytest.mark.real
def test_of_41_pairs_in_the_real_set_33_are_found_and_no_false_one(real_data: Path):
    archives = ("ISIC2018_Task1-2_Training_Input_256.zip", "ISIC2018_Task1_Training_GroundTruth_256.zip")
    sources, files = open_sources(str(real_data / name) for name in archives)
    known = set(ISIC_2018.replace("\n", " ").strip().split(", "))
    in_known = {f"ISIC_{number}" for pair in known for number in pair.split()}
    pairs = pair_files(files).pairs
    pairs = [pair for number, pair in enumerate(pairs) if number % 4 == 0 or pair.key in in_known]  # for speed
    decoded = (load_pair(pair, sources, "stretch", 128) for pair in pairs)
    pictures = (each.resize_plan.resize_content(each.picture) for each in decoded)  # as a build does
    table = np.frombuffer(b"".join(map(perceptual_hash, pictures)), np.uint8)
    near = [(pairs[i], pairs[j]) for i, j, _ in near_pairs(table.reshape(-1, HASH_BYTES))]
    found = {
        f"{first.key} {second.key}".replace("ISIC_", "")
        for first, second in near
        if kind_of(first, second, sources, copied=False) == "near"
    }
    for source in sources:
        source.close()
    assert (len(found), len(known)) == (33, 41)
    assert found < known


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


def test_a_file_of_another_size_has_another_hash():
    assert bytes_hash(9, 1) != bytes_hash(10, 1)
    assert len(bytes_hash(9, 1)) == HASH_BYTES
