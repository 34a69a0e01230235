"""The official score: at the original resolution, against fractions and against the challenge's own scorer."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from isicdist.metrics import original
from isicdist.metrics.dice import DiceSummary
from isicdist.metrics.original import OriginalReduction, has_originals
from shards.build import BuildOptions, build
from shards.errors import CorruptShardError
from shards.reader import ShardSet, Split

THRESHOLD = 0.4


def probs_of(split: Split) -> Tensor:
    """Generate probabilities (N, 1, H, W): right in most places, with noise that differs from image to image."""
    lesion = torch.from_numpy(np.stack([split.mask(number) for number in range(len(split))]))[:, None]
    noise = torch.randn(lesion.shape, generator=torch.Generator().manual_seed(0))
    strength = torch.linspace(0.5, 4, len(split)).view(-1, 1, 1, 1)
    return (4 * (lesion - 0.5) + strength * noise).sigmoid()


def scored(split: Split, probs: Tensor) -> DiceSummary:
    with OriginalReduction(split, thresholds=(0.9, THRESHOLD)) as reduction:
        for numbers in torch.arange(len(split)).split(4):
            ids = torch.cat([numbers, torch.tensor([-1])])  # the last slot is invalid
            batch = torch.cat([probs[numbers], torch.ones_like(probs[:1])])
            reduction.update(batch, batch > 0, ids, ids >= 0)
        high, low = reduction.reduce(Accelerator(cpu=True))
    assert (high.rows[:, 1:3].sum(axis=1) <= low.rows[:, 1:3].sum(axis=1)).all()  # fewer pixels are above 0.9
    return low


def exact(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[Fraction, Fraction, Fraction]:
    """Mean Dice, mean Jaccard and thresholded Jaccard of (truth, prediction) pairs of booleans, in fractions."""
    dices, jaccards = [], []
    for truth, prediction in pairs:
        common, either = int((truth & prediction).sum()), int((truth | prediction).sum())
        dices.append(Fraction(2 * common, either + common) if either else Fraction(1))
        jaccards.append(Fraction(common, either) if either else Fraction(1))
    official = [jaccard if jaccard >= Fraction(65, 100) else Fraction(0) for jaccard in jaccards]
    n = len(pairs)
    return sum(dices, Fraction()) / n, sum(jaccards, Fraction()) / n, sum(official, Fraction()) / n


def assert_equal(summary: DiceSummary, expected: tuple[Any, Any, Any]) -> None:
    found = (summary.mean_dice, summary.mean_jaccard, summary.thresholded_jaccard)
    assert found == pytest.approx([float(value) for value in expected], abs=1e-12)


@pytest.mark.parametrize("fit", ["stretch", "pad", "crop"])
def test_a_prediction_is_counted_on_the_original_pixels(fit, archive, tmp_path):
    build(str(archive[0]), str(archive[1]), tmp_path / "set", BuildOptions(size=32, fit=fit, split="train=0.6,val=0.4"))
    split = ShardSet.open(tmp_path / "set").split("val")
    probs = probs_of(split)
    summary = scored(split, probs)
    pairs = []
    for number, tp, fp, fn in summary.rows.tolist():
        with Image.open(archive[1] / f"{split.key(number)}_segmentation.png") as picture:
            truth = np.asarray(picture.convert("L")) > 128
        restored = split.resize_plan(number).restore(probs[number, 0].numpy())
        prediction = restored > THRESHOLD
        assert prediction.shape == truth.shape
        assert (tp + fn, tp + fp) == (truth.sum(), prediction.sum())
        pairs.append((truth, prediction))
    assert_equal(summary, exact(pairs))
    assert 0 < summary.thresholded_jaccard < summary.mean_jaccard  # the noise put some below 0.65


def test_a_split_without_original_masks_says_so(shard_set):
    shards = ShardSet.open(shard_set)
    assert has_originals(shards.split("test"))
    assert not has_originals(shards.split("train"))


def test_a_damaged_original_mask_stops_the_evaluation(shard_set, monkeypatch):
    split = ShardSet.open(shard_set).split("test")
    probs = probs_of(split)

    def damaged(self: Split, number: int) -> np.ndarray:
        raise CorruptShardError(f"{self.shards[0]}: {self.key(number)}.original.png does not decode")

    monkeypatch.setattr(Split, "original_mask", damaged)
    with pytest.raises(CorruptShardError, match=r"original\.png does not decode"):
        scored(split, probs)


@dataclass(frozen=True, kw_only=True)
class RealScores:
    """The 40 real photographs with generated predictions, scored."""

    summary: DiceSummary
    pairs: list[tuple[np.ndarray, np.ndarray]]
    """(truth, prediction) of each, booleans at the original resolution."""
    truths: Path
    """The folder of the true masks as they were published."""
    predictions: Path
    """The folder of the predictions as PNG."""


@pytest.fixture(scope="module")
def real(real_data, tmp_path_factory) -> RealScores:
    folder, out = real_data / "isic-original", tmp_path_factory.mktemp("real")
    options = BuildOptions(size=64, split="train=0,test=1")
    build(str(folder / "images"), str(folder / "masks"), out / "set", options)
    split = ShardSet.open(out / "set").split("test")
    assert len(split) == 40
    probs = probs_of(split)
    truths, predictions = folder / "masks", out / "predictions"
    predictions.mkdir()
    pairs = []
    for number in range(len(split)):
        with Image.open(truths / f"{split.key(number)}_segmentation.png") as picture:
            truth = np.asarray(picture) > 128
        prob = Image.fromarray(probs[number, 0].numpy())
        prediction = np.asarray(prob.resize(truth.shape[::-1], Image.Resampling.BILINEAR)) > THRESHOLD
        Image.fromarray(prediction).save(predictions / f"{split.key(number)}.png")
        pairs.append((truth, prediction))
    return RealScores(summary=scored(split, probs), pairs=pairs, truths=truths, predictions=predictions)


def test_real_photographs_score_what_fractions_say(real):
    assert_equal(real.summary, exact(real.pairs))
    assert 0 < real.summary.thresholded_jaccard < real.summary.mean_jaccard


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of pandas, in the scorer
def test_real_photographs_score_what_the_challenge_says(real):
    """Where `isic-challenge-scoring` is installed: nothing here depends on it, for it brings 290 MB along."""
    segmentation = pytest.importorskip("isic_challenge_scoring.segmentation")
    pairs = []
    for path in sorted(real.predictions.iterdir()):
        pair = segmentation.ImagePair(truth_file=real.truths / f"{path.stem}_segmentation.png")
        pair.parse_image_id()
        pair.find_prediction_file(real.predictions)
        pair.load_truth_image()
        pair.load_prediction_image()
        pairs.append(pair)
    official = segmentation.SegmentationScore(pairs)
    average = official.macro_average
    assert_equal(real.summary, (average.at["dice"], average.at["jaccard"], average.at["threshold_jaccard"]))
    assert real.summary.thresholded_jaccard == pytest.approx(official.overall, abs=1e-12)


def test_an_image_that_was_not_counted_is_missed(shard_set):
    split = ShardSet.open(shard_set).split("test")
    probs = probs_of(split)
    with OriginalReduction(split, thresholds=(0.5,)) as reduction:
        ids = torch.arange(len(split) - 1)
        reduction.update(probs[:-1], probs[:-1] > 0, ids, ids >= 0)
        with pytest.raises(RuntimeError, match=f"{len(split) - 1} images were counted, but the split has {len(split)}"):
            reduction.reduce(Accelerator(cpu=True))


def test_few_images_wait_to_be_counted(shard_set, monkeypatch):
    monkeypatch.setattr(original, "MAX_PENDING", 2)
    split = ShardSet.open(shard_set).split("test")
    probs = probs_of(split)
    with OriginalReduction(split, thresholds=(0.5,)) as reduction:
        ids = torch.arange(len(split))
        reduction.update(probs, probs > 0, ids, ids >= 0)
        assert len(reduction._pending) == 2
        assert reduction.reduce(Accelerator(cpu=True))[0].n == len(split)
