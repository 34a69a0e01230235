"""summary.json: what is written is read back, files of older versions too, and anything else is refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from isicdist.metrics.dice import DiceSummary
from isicdist.metrics.summary import (
    AreaScores,
    EvaluationSummary,
    ExclusionSummary,
    ResolutionScores,
    SubgroupScores,
    SubgroupSummary,
    ThresholdSummary,
)
from isicdist.metrics.thresholds import CurveSummary

DIGEST = "5c89b6f2" * 8
COUNTS = DiceSummary.of(np.array([[0, 6, 2, 2], [1, 0, 0, 0], [2, 13, 4, 3]]))
SCORES = ResolutionScores.of(COUNTS, DIGEST, None)


def summary_with(original: ResolutionScores | None, tuned: float = 0.25) -> EvaluationSummary:
    return EvaluationSummary(
        split="test",
        data_digest=DIGEST,
        resolution=64,
        model_step=7,
        tta="off",
        relation="held out",
        precision="bf16",
        models=("ab",),
        at_default=ThresholdSummary(threshold=0.5, network=SCORES, original=original),
        at_tuned=ThresholdSummary(threshold=tuned, network=SCORES, original=original),
        thresholds=CurveSummary(
            best_threshold=0.25, best_pooled_dice=0.75, average_precision=0.5, calibration_error=0.125
        ),
        lesion_area_quartiles=(AreaScores.of(COUNTS, DIGEST, None, least_area=0.0, largest_area=0.5),),
        subgroups=SubgroupSummary(column="sex", groups=(SubgroupScores.of(COUNTS, DIGEST, ["a", "b", "a"], value=""),)),
    )


@pytest.mark.parametrize("original", [SCORES, None])
def test_a_summary_is_read_back(original):
    summary = summary_with(original)
    written = json.loads(json.dumps(summary.to_json()))
    assert EvaluationSummary.from_json(written) == summary
    assert {name: written[name] for name in COUNTS.scores()} == COUNTS.scores()  # at 0.5, the network's resolution
    assert written["tuned_threshold"]["threshold"] == 0.25
    assert list(summary.at_default.by_resolution()) == (["network", "original"] if original else ["network"])


def test_an_older_file_names_the_tuned_threshold_otherwise_and_says_less():
    summary = summary_with(None)
    written = summary.to_json()
    written["own_threshold"] = written.pop("tuned_threshold")
    for name in ("relation", "precision", "models"):
        del written[name]
    (part,) = written["lesion_area_quartiles"]
    del part["groups"], part["interval_95"]
    read = EvaluationSummary.from_json(written)
    assert (read.at_default, read.at_tuned) == (summary.at_default, summary.at_tuned)
    assert (read.relation, read.precision, read.models) == ("unknown", "", ())
    assert (read.lesion_area_quartiles[0].n, read.lesion_area_quartiles[0].interval_95) == (3, {})


@pytest.mark.parametrize(
    ("relation", "groups", "cautions"),
    [
        ("held out", 50, []),
        ("held out", 49, ["fewer than 50"]),
        ("chosen on", 50, ["chosen on these images"]),
        ("trained on", 3, ["no scores of unseen ones", "fewer than 50"]),
        ("unknown", 50, ["not recorded"]),
    ],
)
def test_a_reader_is_told_what_makes_a_score_less_than_it_seems(relation, groups, cautions):
    summary = summary_with(None)
    network = dataclasses.replace(SCORES, n=60, groups=groups)
    at_default = dataclasses.replace(summary.at_default, network=network)
    found = dataclasses.replace(summary, relation=relation, at_default=at_default)
    assert len(found.cautions()) == len(cautions)
    assert all(words in caution for words, caution in zip(cautions, found.cautions(), strict=True))
    assert found.images == f"60 images in {groups} groups, which are resampled"


def test_the_same_threshold_is_listed_once():
    assert [scored.threshold for scored in summary_with(None).by_threshold()] == [0.5, 0.25]
    assert [scored.threshold for scored in summary_with(None, tuned=0.5).by_threshold()] == [0.5]


@pytest.mark.parametrize(
    "change",
    [
        {"tuned_threshold": {}},
        {"network_resolution": {"n": "many"}},
        {"network_resolution": None},
        {"thresholds": {"best_threshold": 0.5}},
        {"lesion_area_quartiles": None},
        {"subgroups": [1]},
    ],
)
def test_anything_else_is_refused(change: dict[str, Any]):
    with pytest.raises((KeyError, TypeError, ValueError)):
        EvaluationSummary.from_json({**summary_with(None).to_json(), **change})


def test_scores_without_excluded_images_are_read_back():
    at_default, at_tuned = (ThresholdSummary(threshold=value, network=SCORES, original=None) for value in (0.5, 0.25))
    excluded = ExclusionSummary(table="a.csv", sha256="0", keys=("ISIC_1",), at_default=at_default, at_tuned=at_tuned)
    summary = dataclasses.replace(summary_with(None), without_excluded=excluded)
    assert EvaluationSummary.from_json(json.loads(json.dumps(summary.to_json()))) == summary
