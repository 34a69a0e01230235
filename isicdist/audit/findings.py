"""Findings: every pair of a set with a score of how suspicious its mask is, and the reason, most suspicious first.

The score is the sum of three measures (`isicdist.audit.measures`), each on the scale of the set itself: 0 up to the
median, 1 at the 95th percentile, at most 3. A defect that shows without them, such as a mask that another image has,
too, adds to it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

import numpy as np

from isicdist.audit.measures import Measures

SCORED = ("error_ratio", "contradiction", "shift_gain")
"""Names of the measures in the score."""
MAX_EXCESS = 3.0
SUSPICIOUS = 1.0
"""Score from which on a disagreement of the whole is given as a reason."""
DEFECT_SCORE, FLAW_SCORE = 1.0, 0.25
"""Added for a defect that is no matter of degree, and for small holes and islets."""
MIN_FLAW_SHARE = 0.01
"""Share of the mask from which on its holes or islets are mentioned."""
MIN_TWIN_DICE = 0.8
"""Dice of two masks below which those of duplicate images disagree."""
MIN_SWAP_DICE = 0.85
"""Dice of the masks of two images with each other's predictions from which on they seem exchanged."""

REASONS = {
    "empty": "the mask is empty, but a lesion is predicted",
    "full": "the mask covers the whole image",
    "inverted": "black and white are exchanged",
    "rim": "the mask is a ring around what is predicted",
    "swapped": "mask and prediction fit those of another image crosswise",
    "same-mask": "another image has exactly this mask",
    "duplicates-disagree": "a duplicate of the image has another mask",
    "shifted": "the mask would fit in another place",
    "too-small": "the mask lacks what is predicted with confidence",
    "too-large": "the mask takes in what is confidently background",
    "holes": "the mask has holes",
    "islets": "the mask has small parts apart",
    "": "nothing",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Finding:
    """One pair of the set: its score, the reason for it, and what it was measured by."""

    key: str
    split: str
    score: float
    """0 is usual; 3 is the 95th percentile in all three measures."""
    reason: str
    """A key of `REASONS`; "" for a mask without anything."""
    detail: str
    """The numbers behind the reason, for a reader."""
    measures: Measures


@dataclass(frozen=True, kw_only=True)
class TwinMasks:
    """Two images that show the same thing, and the Dice of their masks."""

    key: str
    duplicate_of: str
    dice: float


def rank(
    keys: Sequence[str],
    splits: Sequence[str],
    measures: Sequence[Measures],
    *,
    mask_hashes: Sequence[bytes] = (),
    twins: Iterable[TwinMasks] = (),
) -> list[Finding]:
    """Rank the pairs of a set, most suspicious first; all sequences are in one order.

    `mask_hashes`: of each mask, to find equal ones. `twins`: duplicate images.
    """
    scores = sum(
        (_excess(np.array([getattr(each, name) for each in measures])) for name in SCORED), np.zeros(len(keys))
    )
    twins = list(twins)
    twin_of = _twins_by_key(twins)
    copies = _equal_masks(keys, mask_hashes, {frozenset((twin.key, twin.duplicate_of)) for twin in twins})
    swapped = _swapped(keys, measures, scores)
    findings: list[Finding] = []
    for index, (key, split, measured) in enumerate(zip(keys, splits, measures, strict=True)):
        twin = twin_of.get(key)
        added, reason, detail = _defect(measured, swapped.get(key), copies.get(key), twin)
        score = float(scores[index]) + added
        if not reason or (reason in ("holes", "islets") and not _is_explained_by(measured, reason)):
            reason, detail = _disagreement(measured, float(scores[index])) or (reason, detail)
        findings.append(Finding(key=key, split=split, score=score, reason=reason, detail=detail, measures=measured))
    return sorted(findings, key=lambda each: (-each.score, each.key))


def _excess(values: np.ndarray) -> np.ndarray:
    """Scale a measure of a set (n,): 0 up to the median, 1 at the 95th percentile, at most MAX_EXCESS."""
    if not len(values):
        return values
    median, high = np.quantile(values, (0.5, 0.95))
    if high <= median:
        return np.zeros(len(values))
    return np.clip((values - median) / (high - median), 0, MAX_EXCESS)


def _defect(
    measured: Measures, swapped: str | None, copy: str | None, twin: TwinMasks | None
) -> tuple[float, str, str]:
    """Give what a defect adds to the score, its reason and detail; "" for none."""
    area = f"{measured.lesion_area:.0%} of the image"
    if not measured.lesion_area and measured.predicted_area:
        return DEFECT_SCORE, "empty", f"{measured.predicted_area:.1%} of the image are predicted"
    if measured.lesion_area == 1:
        return DEFECT_SCORE, "full", f"{measured.predicted_area:.0%} of the image are predicted"
    if measured.inverted_dice >= 0.6 and measured.inverted_dice > measured.dice + 0.3:
        return DEFECT_SCORE, "inverted", f"Dice {measured.dice:.2f}, inverted {measured.inverted_dice:.2f}; {area}"
    if measured.hole_share >= 0.15 and measured.filled_dice > measured.dice + 0.05:
        return DEFECT_SCORE, "rim", f"Dice {measured.dice:.2f}, filled {measured.filled_dice:.2f}"
    if swapped:
        return DEFECT_SCORE, "swapped", f"with {swapped}"
    if copy:
        return DEFECT_SCORE, "same-mask", f"as {copy}"
    if twin and twin.dice < MIN_TWIN_DICE:
        other = twin.duplicate_of
        return DEFECT_SCORE * (1 - twin.dice), "duplicates-disagree", f"Dice {twin.dice:.2f} with the mask of {other}"
    if measured.hole_share >= MIN_FLAW_SHARE:
        return FLAW_SCORE, "holes", f"{measured.hole_share:.1%} of the mask"
    if measured.islet_share >= MIN_FLAW_SHARE:
        return FLAW_SCORE, "islets", f"{measured.islet_share:.1%} of the mask"
    return 0.0, "", ""


def _is_explained_by(measured: Measures, flaw: str) -> bool:
    """True if most of the error is gone where the holes of the mask are filled, or without its islets."""
    repaired = measured.filled_dice if flaw == "holes" else measured.largest_dice
    return repaired - measured.dice > (1 - measured.dice) / 2


def _disagreement(measured: Measures, score: float) -> tuple[str, str] | None:
    """Name how a mask disagrees with the probabilities as a whole, with the numbers; None below SUSPICIOUS."""
    if score < SUSPICIOUS:
        return None
    if measured.shift_gain > 1 and measured.shifted_dice > measured.dice + 0.1:
        down, right = measured.shift
        sideways, upright = "right" if right > 0 else "left", "down" if down > 0 else "up"
        move = f"{abs(right):.0%} {sideways} and {abs(down):.0%} {upright}"
        return "shifted", f"Dice {measured.dice:.2f}, moved {move}: {measured.shifted_dice:.2f}"
    if measured.contradiction:
        is_small = measured.missing_share > 0.5
    else:  # nothing is contradicted with confidence
        is_small = measured.lesion_area < measured.predicted_area
    reason = "too-small" if is_small else "too-large"
    return reason, f"Dice {measured.dice:.2f}, where {measured.expected_dice:.2f} was expected"


def _twins_by_key(twins: Iterable[TwinMasks]) -> dict[str, TwinMasks]:
    """Map each of two duplicate images to the pair, the worst of several."""
    worst: dict[str, TwinMasks] = {}
    for twin in twins:
        for key, other in ((twin.key, twin.duplicate_of), (twin.duplicate_of, twin.key)):
            if key not in worst or twin.dice < worst[key].dice:
                worst[key] = TwinMasks(key=key, duplicate_of=other, dice=twin.dice)
    return worst


def _equal_masks(keys: Sequence[str], hashes: Sequence[bytes], twins: Set[frozenset[str]]) -> dict[str, str]:
    """Map each image to another one with exactly its mask that is no duplicate of it; b"" is no hash."""
    by_hash: dict[bytes, list[str]] = defaultdict(list)
    for key, value in zip(keys, hashes, strict=bool(hashes)):
        by_hash[value].append(key)
    copies: dict[str, str] = {}
    for value, same in by_hash.items():
        for key in same if value else ():
            other = next((each for each in same if each != key and frozenset((key, each)) not in twins), None)
            if other:
                copies[key] = other
    return copies


def _swapped(keys: Sequence[str], measures: Sequence[Measures], scores: np.ndarray) -> dict[str, str]:
    """Map images to those that they seem to have exchanged masks with: each mask fits the other's prediction."""
    suspects = np.flatnonzero(scores >= SUSPICIOUS)
    if len(suspects) < 2:
        return {}
    grids = np.stack([measures[index].thumbnails for index in suspects.tolist()]).reshape(len(suspects), 2, -1)
    masks, predictions = (grids[:, kind].astype(np.float32) for kind in (0, 1))
    total = masks.sum(axis=1)[:, None] + predictions.sum(axis=1)[None]
    dice = 2 * (masks @ predictions.T) / np.maximum(total, 1)  # (n, n): mask i and prediction j
    own = np.diag(dice)
    fits = (dice >= MIN_SWAP_DICE) & (dice > own[:, None] + 0.3)
    mutual = np.where(fits & fits.T, dice + dice.T, 0)
    partners = {int(suspects[row]): int(suspects[mutual[row].argmax()]) for row in np.flatnonzero(mutual.any(axis=1))}
    return {keys[index]: keys[partner] for index, partner in partners.items()}
