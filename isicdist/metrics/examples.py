"""Examples of an evaluation: images with their ground truth and prediction, for dashboards and reports.

In training: the same fixed images each time, so that progress shows, and the worst ones by Dice. After it: the worst,
median and best ones, written to files:

examples/examples.json           keys, groups and scores, in order: `Example.to_json` of each
examples/KEY.jpg                 the image at the size the network sees
examples/KEY.mask.png            the ground truth, 1 bit per pixel
examples/KEY.prediction.png      the prediction at the tuned threshold, 1 bit per pixel
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from isicdist.metrics.dice import DEFAULT_THRESHOLD, DiceSummary, per_image_scores
from isicdist.metrics.results import Results
from shards.codecs import decode_image, decode_mask, encode_image, encode_mask
from shards.files import atomic_folder
from shards.format import KEY_PATTERN, parse_json
from shards.geometry import draw_outline
from shards.reader import Split

Predictor = Callable[[Tensor], Tensor]
"""Function that returns probabilities (B, 1, H, W) float32 in [0, 1] for images (B, 3, H, W) uint8."""
TRUTH_COLOUR, PREDICTION_COLOUR = "#ffe600", "#00e5ff"
"""Colours of the outlines of ground truth and prediction, which skin does not have."""
OUTLINE_SHARE = 1 / 128
"""Width of an outline, as a share of the image's longer side."""
EXAMPLES_FOLDER, EXAMPLES_NAME = "examples", "examples.json"
EXAMPLES = 4
"""Maximum number of images in each group: the worst, the median and the best."""
TRAINING_EXAMPLES = 8
"""Maximum number of fixed and of worst images at an evaluation in training."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """One image of an evaluated split, with its ground truth and its prediction."""

    group: str
    """worst, median or best; in training fixed or worst."""
    key: str
    """Key of the sample (its ISIC id)."""
    dice: float
    """Dice, 0 to 1: at the tuned threshold and the finest resolution; in training at 0.5 and the network's."""
    lesion_area: float
    """Share of the image that is lesion in the ground truth, 0 to 1."""
    aspect_ratio: float
    """Width over height at which the image looks as it was taken: a stretched one is shown at its original's."""
    image: np.ndarray
    """RGB, uint8 (H, W, 3)."""
    mask: np.ndarray
    """Ground truth, bool (H, W)."""
    prediction: np.ndarray
    """Prediction at that threshold, bool (H, W)."""

    @property
    def caption(self) -> str:
        """The key and the score, in one line."""
        return f"{self.key}  Dice {self.dice:.3f}"

    def outlined(self) -> np.ndarray:
        """Draw the outlines of ground truth and prediction into a copy of the image, uint8 (H, W, 3)."""
        picture = self.image.copy()
        width = max(1, round(max(self.mask.shape) * OUTLINE_SHARE))
        for mask, colour in ((self.mask, TRUTH_COLOUR), (self.prediction, PREDICTION_COLOUR)):
            draw_outline(picture, mask, colour, width)
        return picture

    def to_json(self) -> dict[str, Any]:
        """Return everything but the pixels, as an entry of examples.json."""
        names = ("group", "key", "dice", "lesion_area", "aspect_ratio")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], folder: Path) -> Self:
        """Read an entry of examples.json and its files.

        Raises KeyError, TypeError or ValueError for a malformed entry or file, OSError for a missing file.
        """
        key = str(value["key"])
        if not KEY_PATTERN.fullmatch(key):  # or it could name a file outside of the folder
            raise ValueError(f"key {key!r}")
        paths = _paths(folder, key)
        return cls(
            group=str(value["group"]),
            key=key,
            dice=float(value["dice"]),
            lesion_area=float(value["lesion_area"]),
            aspect_ratio=float(value["aspect_ratio"]),
            image=decode_image(paths.image.read_bytes()),
            mask=decode_mask(paths.mask.read_bytes()) > 0,
            prediction=decode_mask(paths.prediction.read_bytes()) > 0,
        )


@dataclass(frozen=True, kw_only=True)
class _Paths:
    image: Path
    mask: Path
    prediction: Path


def _paths(folder: Path, key: str) -> _Paths:
    return _Paths(
        image=folder / f"{key}.jpg", mask=folder / f"{key}.mask.png", prediction=folder / f"{key}.prediction.png"
    )


@torch.inference_mode()
def select_examples(predictor: Predictor, results: Results, device: torch.device) -> list[Example]:
    """Select the worst, median and best images by Dice and predict their masks.

    Dice and predictions are those at the tuned threshold; fewer images are selected from a split of less than twelve.
    """
    rows = results.at_tuned.finest.rows
    dice, _ = per_image_scores(rows)
    ranking = np.argsort(dice, kind="stable")
    number = max(1, min(EXAMPLES, len(ranking) // 3))
    middle = (len(ranking) - number) // 2
    groups = {"worst": ranking[:number], "median": ranking[middle : middle + number], "best": ranking[-number:]}
    threshold = results.at_tuned.threshold
    examples: list[Example] = []
    for group, ranked in groups.items():
        examples += _predict_examples(
            predictor, results.split, group, rows[ranked], dice[ranked], results.lesion_areas[ranked], threshold, device
        )
    return examples


@torch.inference_mode()
def select_training_examples(
    predictor: Predictor, split: Split, summary: DiceSummary, device: torch.device, *, micro_size: int
) -> list[Example]:
    """Select images evenly over the split (group `fixed`) and those of the lowest Dice (`worst`), and predict them.

    Not a collective: the main process calls it alone. `predictor` always gets `micro_size` images, as in the
    evaluation: a compiled network would be compiled again for another number. Raises ShardSetError for a sample that
    cannot be read.
    """
    rows = summary.rows
    dice, _ = per_image_scores(rows)
    assert split.size is not None, "the stream of an evaluation has refused images of several sizes"
    areas = rows[:, [1, 3]].sum(axis=1) / split.size**2  # TP + FN of all pixels
    fixed = np.unique(np.linspace(0, len(dice) - 1, min(TRAINING_EXAMPLES, len(dice))).round().astype(int))
    groups = {"fixed": fixed, "worst": np.argsort(dice, kind="stable")[:TRAINING_EXAMPLES]}

    def predict_padded(images: Tensor) -> Tensor:
        count, channels, height, width = images.shape
        whole = -(-count // micro_size) * micro_size
        pixels = torch.zeros((whole, height, width, channels), dtype=images.dtype, device=images.device)
        padded = pixels.permute(0, 3, 1, 2)  # in the memory layout of the stream's batches, too
        padded[:count] = images
        return torch.cat([predictor(part) for part in padded.split(micro_size)])[:count]

    examples: list[Example] = []
    for group, ranked in groups.items():
        examples += _predict_examples(
            predict_padded, split, group, rows[ranked], dice[ranked], areas[ranked], DEFAULT_THRESHOLD, device
        )
    return examples


def _predict_examples(
    predictor: Predictor,
    split: Split,
    group: str,
    rows: np.ndarray,
    dice: np.ndarray,
    lesion_areas: np.ndarray,
    threshold: float,
    device: torch.device,
) -> Iterator[Example]:
    """Predict the images of rows (N, 4) of (id, TP, FP, FN), with their Dice (N,) and lesion areas (N,)."""
    indices = rows[:, 0].tolist()
    images = np.stack([split.image(index) for index in indices])  # (N, H, W, 3)
    probs = predictor(torch.from_numpy(images).to(device).permute(0, 3, 1, 2))[:, 0].cpu().numpy()  # (N, H, W)
    for index, image, prob, score, area in zip(indices, images, probs, dice, lesion_areas, strict=True):
        yield Example(
            group=group,
            key=split.key(index),
            dice=float(score),
            lesion_area=float(area),
            aspect_ratio=split.resize_plan(index).aspect_ratio,
            image=image,
            mask=split.mask(index) > 0,
            prediction=prob > threshold,
        )


def write_examples(examples: Iterable[Example], folder: Path) -> None:
    """Write the examples into `folder`, in the place of those of an earlier evaluation."""
    with atomic_folder(folder) as new:
        entries: list[dict[str, Any]] = []
        for example in examples:
            paths = _paths(new, example.key)
            paths.image.write_bytes(encode_image(example.image))
            paths.mask.write_bytes(encode_mask(example.mask))
            paths.prediction.write_bytes(encode_mask(example.prediction))
            entries.append(example.to_json())
        (new / EXAMPLES_NAME).write_text(json.dumps(entries, indent=1) + "\n")


def read_examples(folder: Path) -> list[Example]:
    """Read what `write_examples` wrote.

    Raises KeyError, TypeError or ValueError for a malformed file, OSError for a missing one.
    """
    return [Example.from_json(entry, folder) for entry in parse_json((folder / EXAMPLES_NAME).read_bytes())]
