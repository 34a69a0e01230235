"""Examples of an evaluation: chosen by Dice, written as files and read back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from isicdist.metrics.dice import DiceSummary
from isicdist.metrics.examples import (
    EXAMPLES_NAME,
    TRAINING_EXAMPLES,
    Example,
    read_examples,
    select_training_examples,
    write_examples,
)
from shards.reader import ShardSet


def example(key: str) -> Example:
    mask = np.zeros((16, 24), bool)
    mask[2:9, 3:11] = True
    return Example(
        group="worst",
        key=key,
        dice=0.25,
        lesion_area=0.5,
        aspect_ratio=1.5,
        image=np.full((16, 24, 3), (180, 120, 90), np.uint8),
        mask=mask,
        prediction=~mask,
    )


def test_what_is_written_is_read_back(tmp_path):
    write_examples([example("ISIC_1"), example("ISIC_2")], tmp_path / "examples")
    found = read_examples(tmp_path / "examples")
    assert [each.key for each in found] == ["ISIC_1", "ISIC_2"]
    written = example("ISIC_1")
    assert found[0].to_json() == written.to_json()
    np.testing.assert_array_equal(found[0].mask, written.mask)
    np.testing.assert_array_equal(found[0].prediction, written.prediction)
    assert np.abs(found[0].image.astype(int) - written.image).max() <= 2  # a JPEG


def test_an_earlier_evaluation_is_replaced(tmp_path):
    write_examples([example("ISIC_1")], tmp_path)
    write_examples([example("ISIC_2")], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "ISIC_2.jpg",
        "ISIC_2.mask.png",
        "ISIC_2.prediction.png",
        EXAMPLES_NAME,
    ]


@pytest.mark.parametrize("key", ["../secret", "a/b", ""])
def test_a_key_that_names_a_file_elsewhere_is_refused(tmp_path: Path, key: str):
    write_examples([example("ISIC_1")], tmp_path)
    entries = json.loads((tmp_path / EXAMPLES_NAME).read_text())
    (tmp_path / EXAMPLES_NAME).write_text(json.dumps([{**entries[0], "key": key}]))
    with pytest.raises(ValueError, match="key"):
        read_examples(tmp_path)


def test_an_evaluation_in_training_shows_fixed_images_and_the_worst(shard_set):
    split = ShardSet.open(shard_set).split("train")
    assert split.size
    pixels = split.size**2
    batches: list[tuple[int, ...]] = []

    def red(images: Tensor) -> Tensor:
        """Predict the red channel."""
        batches.append((*images.shape, *images.stride()))
        return images[:, :1] / 255

    def select(hits: np.ndarray) -> list[Example]:
        rows = np.stack([np.arange(len(split)), hits, np.full(len(split), 9), pixels // 4 - hits], axis=1)
        return select_training_examples(red, split, DiceSummary.of(rows), torch.device("cpu"), micro_size=5)

    first, second = select(np.arange(len(split))), select(np.arange(len(split))[::-1])
    # The last batch is padded, in the memory layout of the stream, or a compiled network would be compiled again.
    assert set(batches) == {(5, 3, 64, 64, 3 * pixels, 1, 3 * 64, 3)}
    fixed, worst = ([each for each in first if each.group == group] for group in ("fixed", "worst"))
    assert [each.key for each in fixed] == [each.key for each in second if each.group == "fixed"]
    assert (fixed[0].key, fixed[-1].key) == (split.key(0), split.key(len(split) - 1))
    assert [each.key for each in worst] == [split.key(index) for index in range(TRAINING_EXAMPLES)]
    assert worst[0].dice < worst[1].dice
    assert worst[0].lesion_area == 0.25
    meta = split.meta(0)
    assert worst[0].aspect_ratio == meta["width"] / meta["height"] != 1  # a stretched image is shown as it was taken
    assert np.array_equal(fixed[3].prediction, fixed[3].image[..., 0] > 127)
    assert np.array_equal(fixed[0].mask, split.mask(0) > 0)


def test_a_split_of_one_image_has_one_example_of_each_kind(shard_set):
    split = ShardSet.open(shard_set).split("val")
    summary = DiceSummary.of(np.array([[1, 1, 1, 1]]))
    examples = select_training_examples(
        lambda images: torch.ones(len(images), 1, 64, 64), split, summary, torch.device("cpu"), micro_size=4
    )
    assert [(each.group, each.key) for each in examples] == [("fixed", split.key(1)), ("worst", split.key(1))]
