"""Probabilities of images by models that have not seen them: of a cross-validation, and of its ensemble."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from isicdist.config import Fold
from isicdist.data.folds import POOLED_SPLITS, open_folds
from isicdist.errors import CheckpointError
from isicdist.evaluate import check_scored
from isicdist.metrics.examples import Predictor
from isicdist.network.ensemble import Ensemble
from isicdist.training.scoring import score
from shards.reader import ShardSet, Split

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, kw_only=True)
class HeldOutSplit:
    """Samples, and a model that has not seen them."""

    split: Split
    """The held-out samples of a fold, or a split that no fold has."""
    name: str
    """Name of the split in the audit: train+val for a fold."""
    predictor: Predictor


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One image with its probabilities."""

    split: Split
    index: int
    split_name: str
    levels: np.ndarray
    """Probabilities in 255ths, uint8 (H, W)."""

    @property
    def key(self) -> str:
        """Key of the sample (its ISIC id)."""
        return self.split.key(self.index)

    def mask(self) -> np.ndarray:
        """Decode the mask, bool (H, W)."""
        return self.split.mask(self.index) > 0


def held_out_splits(shards: ShardSet, runs: Path, ensemble: Ensemble) -> list[HeldOutSplit]:
    """Pair the samples of a set with models that have not seen them; `ensemble`: of the folder `runs`.

    The images of train and val get the model of the fold that held them out, other splits get the ensemble.
    Raises CheckpointError where it is not a cross-validation of this set, and what `open_folds` and `check_scored`
    raise.
    """
    found = [Fold.of_split(member.metadata.score.split) for member in ensemble.members]
    folds = [fold for fold in found if fold and fold.count == len(found)]
    if len(folds) < len(found):
        raise CheckpointError(f"{runs}: not the folder of a cross-validation; train one with isicdist crossval")
    for name, member in zip(ensemble.names, ensemble.members, strict=True):
        if member.metadata.data_digest != shards.digest:
            raise CheckpointError(
                f"{runs}: {name} was trained on another set than {shards.location} and may have seen images of it; "
                "train it again"
            )
    pooled = "+".join(POOLED_SPLITS)
    parts = [
        HeldOutSplit(split=held_out, name=pooled, predictor=member)
        for (_, held_out), member in zip(open_folds(shards, folds), ensemble.members, strict=True)
    ]
    others = [shards.split(name) for name in shards.index.splits if name not in POOLED_SPLITS]
    parts += [HeldOutSplit(split=split, name=split.name, predictor=ensemble) for split in others]
    for part in parts:
        check_scored(part.split, shards, ensemble.input_spec, str(runs))
    return parts


def predict(
    parts: Sequence[HeldOutSplit], accelerator: Accelerator, levels: np.ndarray, progress: Callable[[int], None]
) -> list[Sample]:
    """Predict all samples into `levels`, uint8 (n, H, W), in one process; `progress` gets the number of those done."""
    samples: list[Sample] = []
    for part in parts:
        done = len(samples)
        rows = levels[done : done + len(part.split)]
        score(
            part.predictor,
            part.split,
            accelerator,
            metrics=[_Levels(rows)],
            progress=lambda count, done=done: progress(done + count),
        )
        samples += [
            Sample(split=part.split, index=index, split_name=part.name, levels=row) for index, row in enumerate(rows)
        ]
    return samples


class _Levels:
    """Metric that stores probabilities in 255ths."""

    def __init__(self, levels: np.ndarray) -> None:
        self._levels = levels

    def update(self, probs: Tensor, masks: Tensor, ids: Tensor, valid: Tensor) -> None:
        """Store one batch: probs (B, 1, H, W), indices of samples (B,), slots that hold one (B,) bool."""
        levels = (probs[valid, 0].float() * 255).round().to(torch.uint8)
        self._levels[ids[valid].cpu().numpy()] = levels.cpu().numpy()
