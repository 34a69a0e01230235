"""Examples of an evaluation: chosen by Dice, written as files and read back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from isicdist.metrics.examples import EXAMPLES_NAME, Example, read_examples, write_examples


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
