"""Folds: every image of train and val is held out once, groups and duplicates stay together, a grown set moves none."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from isicdist.config import Fold, TrainConfig
from isicdist.data import folds
from isicdist.data.folds import fold_number, open_fold, open_folds
from shards.build import BuildOptions, build
from shards.errors import ShardSetError, UsageError
from shards.reader import ShardSet, Split


def keys(split: Split) -> list[str]:
    return [split.key(index) for index in range(len(split))]


def folds_of(shards: ShardSet, count: int) -> list[tuple[Split, Split]]:
    return [open_fold(shards, Fold(number=number, count=count)) for number in range(1, count + 1)]


def test_every_image_of_train_and_val_is_held_out_once_and_is_read_as_in_its_split(shard_set):
    shards = ShardSet.open(shard_set)
    splits = [shards.split("train"), shards.split("val")]
    pooled = sorted(key for split in splits for key in keys(split))
    folds = folds_of(shards, 3)
    assert sorted(key for _, held_out in folds for key in keys(held_out)) == pooled
    for train, held_out in folds:
        assert sorted(keys(train) + keys(held_out)) == pooled
        assert (np.diff(train.table["shard"].astype(int)) >= 0).all()  # shard by shard, as the order expects
    images = {split.key(index): split.image(index) for split in splits for index in range(len(split))}
    for split in folds[0]:
        for index in range(len(split)):
            np.testing.assert_array_equal(split.image(index), images[split.key(index)])


def test_groups_and_duplicates_are_in_one_fold(archive, tmp_path):
    images, masks = tmp_path / "images", tmp_path / "masks"
    shutil.copytree(archive[0], images)
    shutil.copytree(archive[1], masks)
    names = sorted(path.stem for path in images.glob("*.jpg"))
    shutil.copy(images / f"{names[3]}.jpg", images / "ISIC_0999999.jpg")  # the same photograph twice
    shutil.copy(masks / f"{names[3]}_segmentation.png", masks / "ISIC_0999999_segmentation.png")
    table = tmp_path / "groups.csv"
    table.write_text("id,lesion_id\n" + "".join(f"{name},L{i // 4}\n" for i, name in enumerate(names)))
    out = tmp_path / "set"
    options = BuildOptions(size=32, groups=f"{table}:lesion_id", split="train=0.7,val=0.3")
    build(str(images), str(masks), out, options)
    shards = ShardSet.open(out)
    fold_of = {key: i for i, (_, held_out) in enumerate(folds_of(shards, 4)) for key in keys(held_out)}
    assert len(fold_of) == sum(len(shards.split(name)) for name in ("train", "val"))
    folds_of_group = {}
    for i, name in enumerate(names):
        if name in fold_of:
            folds_of_group.setdefault(i // 4, set()).add(fold_of[name])
    assert {len(found) for found in folds_of_group.values()} == {1}
    assert len(set.union(*folds_of_group.values())) == 4
    assert fold_of["ISIC_0999999"] == fold_of[names[3]]

    duplicates = out / "duplicates.csv"
    duplicates.write_text(duplicates.read_text().splitlines()[0] + "\n")
    with pytest.raises(ShardSetError, match="0 pairs of duplicates, but the index counts 1"):
        open_fold(shards, Fold(number=1, count=4))
    for damaged in (b"\xff", b"key,duplicate_of,same\na,b,near\n", b"key,duplicate_of,same,distance\na,b,near,x\n"):
        duplicates.write_bytes(damaged)
        with pytest.raises(ShardSetError, match="not a list of duplicates"):
            open_fold(shards, Fold(number=1, count=4))


def test_the_fold_of_a_group_is_golden():
    """A change would move images between the folds of runs that exist."""
    assert [fold_number(f"ISIC_{i:07d}", 5) for i in range(12)] == [2, 1, 2, 2, 5, 1, 4, 3, 1, 2, 3, 4]


@pytest.mark.parametrize("text", ["0/5", "6/5", "1/1", "1", "a/b", "1/5/5", "-1/5", " 1/5"])
def test_a_fold_is_written_k_of_n(text):
    with pytest.raises(UsageError, match=f"^fold is {text}: write K/N"):
        TrainConfig(fold=text)


def test_more_folds_than_images_are_refused(shard_set):
    with pytest.raises(UsageError, match=r"fold .* has none of its .* images to hold out; make fewer folds"):
        folds_of(ShardSet.open(shard_set), 1000)


def test_a_run_on_a_fold_is_scored_on_its_own_held_out_images(python, shard_set, tmp_path):
    run = tmp_path / "run"
    small = ["--steps", 2, "--eval-every", 2, "--batch.global-size", 8, "--model.base-channels", 2]
    train = python("-m", "isicdist", "train", "--data", shard_set, "--run", run, "--fold", "2/3", *small)
    assert train.returncode == 0, train.stderr
    evaluate = ["-m", "isicdist", "evaluate", "--data", shard_set, "--checkpoint", run]
    done = python(*evaluate, "--fold", "2/3")
    assert done.returncode == 0, done.stderr
    held_out = open_fold(ShardSet.open(shard_set), Fold.parse("2/3"))[1]
    rows = (run / "evaluation" / held_out.name / "per_image.csv").read_text().splitlines()[1:]
    assert sorted(row.split(",")[0] for row in rows) == sorted(keys(held_out))
    for seen in (["--fold", "1/3"], ["--split", "val"]):
        refused = python(*evaluate, *seen)
        assert refused.returncode == 2
        assert "it has seen images of" in refused.stderr


def test_a_model_of_the_val_split_has_seen_the_images_of_folds(shard_set):
    run = Path(__file__).parents[2] / "golden" / "run-0.1"
    from isicdist.evaluate import evaluate

    with pytest.raises(UsageError, match="trained without --fold, so that it has seen images of fold_1_of_5"):
        evaluate(run, str(shard_set), Fold.parse("1/5"))


def test_every_fold_is_checked_for_images_to_train_on_and_to_hold_out(shard_set, monkeypatch):
    shards = ShardSet.open(shard_set)
    monkeypatch.setattr(folds, "fold_number", lambda group, count: 1)
    with pytest.raises(UsageError, match=r"fold 1/2 has none of its .* images to train on"):
        open_folds(shards, [Fold(number=1, count=2)])
    monkeypatch.setattr(folds, "fold_number", lambda group, count: 1 + int(group[-1]) % 2)
    open_folds(shards, Fold(number=1, count=2).all)
    with pytest.raises(UsageError, match=r"fold 3/3 has none of its .* images to hold out"):
        open_folds(shards, Fold(number=1, count=3).all)


def test_a_set_without_val_has_folds_too(archive, tmp_path):
    build(str(archive[0]), str(archive[1]), tmp_path / "set", BuildOptions(size=32, split="train=0.7,test=0.3"))
    shards = ShardSet.open(tmp_path / "set")
    held_out = [key for _, split in folds_of(shards, 2) for key in keys(split)]
    assert sorted(held_out) == sorted(keys(shards.split("train")))
