"""The ranking: each kind of wrong mask comes to the top with its reason, whatever the scale of the set."""

from __future__ import annotations

import numpy as np
import pytest

from isicdist.audit.findings import DEFECT_SCORE, REASONS, Finding, TwinMasks, rank
from isicdist.audit.measures import Measures, measure
from tests.isicdist.audit.test_measures import CONFIDENCE, disc, levels_of

NUMBER = 40


def places() -> list[tuple[float, float, float]]:
    """Row, column and radius of the lesion of each image."""
    random = np.random.default_rng(0)
    return [(random.uniform(30, 66), random.uniform(30, 66), random.uniform(8, 24)) for _ in range(NUMBER)]


def masks() -> list[np.ndarray]:
    """Masks whose outlines differ from the lesion's by up to an eighth of the radius, as annotators do."""
    random = np.random.default_rng(1)
    return [disc(row, column, radius * random.uniform(0.88, 1.12)) for row, column, radius in places()]


def measures_of(found: list[np.ndarray]) -> list[Measures]:
    return [measure(mask, levels_of(disc(*place)), CONFIDENCE) for mask, place in zip(found, places(), strict=True)]


def ranked(found: list[np.ndarray], **extra: object) -> list[Finding]:
    keys = [f"ISIC_{number:02d}" for number in range(NUMBER)]
    return rank(keys, ["train+val"] * NUMBER, measures_of(found), **extra)  # pyright: ignore[reportArgumentType]


def corrupted(kind: str, mask: np.ndarray) -> np.ndarray:
    out = mask.copy()
    rows, columns = np.nonzero(mask)
    if kind == "empty":
        out[:] = False
    elif kind == "full":
        out[:] = True
    elif kind == "inverted":
        out = ~mask
    elif kind == "rim":
        radius = np.sqrt(mask.sum() / np.pi)
        out &= ~disc(float(rows.mean()), float(columns.mean()), radius * 0.8)
    elif kind == "shifted":
        out = np.roll(mask, (20, 20), axis=(0, 1))
    elif kind == "too-small":
        out[:, : int(np.quantile(columns, 0.45))] = False
    else:
        out |= disc(float(rows.mean()), float(columns.mean()), 2 * np.sqrt(mask.sum() / np.pi))
    return out


@pytest.mark.parametrize("kind", ["empty", "full", "inverted", "rim", "shifted", "too-small", "too-large"])
def test_each_kind_of_wrong_mask_comes_first_with_its_reason(kind):
    found = masks()
    found[7] = corrupted(kind, found[7])
    first = ranked(found)[0]
    assert (first.key, first.reason) == ("ISIC_07", kind)
    assert first.detail
    assert first.reason in REASONS


def test_masks_that_two_images_exchanged_name_each_other():
    found = masks()
    far = sorted(range(NUMBER), key=lambda number: places()[number][0])
    first, second = far[0], far[-1]
    found[first], found[second] = found[second], found[first]
    top = {each.key: each for each in ranked(found)[:2]}
    names = [f"ISIC_{number:02d}" for number in (first, second)]
    assert set(top) == set(names)
    assert [top[name].reason for name in names] == ["swapped", "swapped"]
    assert top[names[0]].detail == f"with {names[1]}"


def test_equal_masks_are_named_unless_the_images_are_duplicates():
    hashes = [bytes([number]) for number in range(NUMBER)]
    hashes[4] = hashes[3]
    hashes[6] = hashes[5] = b""
    found = {each.key: each for each in ranked(masks(), mask_hashes=hashes)}
    assert (found["ISIC_03"].reason, found["ISIC_03"].detail) == ("same-mask", "as ISIC_04")
    assert found["ISIC_04"].score >= DEFECT_SCORE
    assert found["ISIC_05"].reason != "same-mask"
    twins = [TwinMasks(key="ISIC_04", duplicate_of="ISIC_03", dice=1.0)]
    assert all(each.reason != "same-mask" for each in ranked(masks(), mask_hashes=hashes, twins=twins))
    twins.append(TwinMasks(key="ISIC_09", duplicate_of="ISIC_03", dice=0.5))
    found = {each.key: each for each in ranked(masks(), mask_hashes=hashes, twins=twins)}
    assert found["ISIC_03"].reason == "duplicates-disagree"


def test_duplicates_with_different_masks_are_both_found():
    twins = [
        TwinMasks(key="ISIC_04", duplicate_of="ISIC_03", dice=0.2),
        TwinMasks(key="ISIC_09", duplicate_of="ISIC_03", dice=0.95),
    ]
    found = {each.key: each for each in ranked(masks(), twins=twins)}
    assert found["ISIC_03"].detail == "Dice 0.20 with the mask of ISIC_04"
    assert found["ISIC_04"].reason == "duplicates-disagree"
    assert found["ISIC_09"].reason != "duplicates-disagree"


def test_holes_and_islets_are_the_reason_where_they_explain_the_error():
    found = masks()
    *_, second, first = sorted(range(NUMBER), key=lambda number: places()[number][2])
    row, column, _ = (round(value) for value in places()[first])
    found[first] = disc(*places()[first])
    found[first][row : row + 7, column : column + 7] = False
    found[second] = disc(*places()[second]) | disc(6, 6, 4)
    listed = {each.key: each for each in ranked(found)}
    assert [listed[f"ISIC_{number:02d}"].reason for number in (first, second)] == ["holes", "islets"]


def test_one_pair_or_none_is_ranked_without_a_scale():
    assert rank([], [], []) == []
    mask = disc()
    (only,) = rank(["ISIC_1"], ["test"], [measure(~mask, levels_of(mask), CONFIDENCE)])
    assert (only.reason, only.score) == ("inverted", DEFECT_SCORE)
