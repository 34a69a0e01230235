"""Benchmark of the audit: how many corrupted masks are among the most suspicious ones, next to other rankings.

    python benchmarks/audit.py --data SET --run RUNS
    pip install -c constraints.txt -e '.[audit,bench]'

The models of a cross-validation predict a set once, each the images that it has not seen. Then 5 % of the masks of
train and val are corrupted, an equal number in each of five ways, and every ranking is given the same masks and
probabilities. Of the same number of most suspicious pairs it counts the corrupted ones: precision and recall at 5 %.
Repeated with other seeds; mean and standard deviation are over the seeds.

    isicdist          `isicdist.audit`
    dice              1 - Dice of mask and prediction at 0.5
    cleanlab softmin  cleanlab.segmentation.rank.get_label_quality_scores, its default: softmin over the pixels
    cleanlab pixels   the same with method="num_pixel_issues": confident disagreement, as a share of the image

The masks of the set have errors of their own, which count as false alarms. The models were trained on the masks as
they are, without the corruptions.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
from cleanlab.segmentation import rank as cleanlab  # pyright: ignore[reportMissingImports]
from scipy import ndimage

from isicdist.audit.findings import rank
from isicdist.audit.held_out import held_out_splits, predict
from isicdist.audit.measures import Confidence, Measures, measure, probability_histograms
from isicdist.distributed import launch
from isicdist.network.cpu_precision import faster_cpu_precision
from isicdist.network.ensemble import load_ensemble
from shards.reader import ShardSet

SHARE = 0.05
SHIFTS = (0.1, 0.2)
"""Length of a shift, as a share of the image's side."""
RIM = 0.24
"""Width of a rim, as a share of the lesion's radius."""
MISSING = (0.25, 0.5)
"""Share of the lesion that is cut off along a straight line."""

Corruption = Callable[[np.ndarray, np.random.Generator], np.ndarray]
Ranking = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Gives a score of suspicion for each of the masks (n, H, W) bool with their probabilities (n, H, W) uint8."""


def rim(mask: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Keep a ring along the outline."""
    width = max(1, round(RIM * float(np.sqrt(mask.sum() / np.pi))))
    return mask & ~np.asarray(ndimage.binary_erosion(mask, iterations=width), dtype=np.bool_)


def shift(mask: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Move the mask in any direction; what leaves the image is lost."""
    angle, length = random.uniform(0, 2 * np.pi), random.uniform(*SHIFTS) * len(mask)
    return ndimage.shift(mask.astype(np.uint8), (length * np.sin(angle), length * np.cos(angle)), order=0) > 0


def invert(mask: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Exchange black and white."""
    return ~mask


def missing(mask: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Cut off a part along a straight line."""
    rows, columns = np.nonzero(mask)
    angle = random.uniform(0, 2 * np.pi)
    along = rows * np.sin(angle) + columns * np.cos(angle)
    cut = along < np.quantile(along, random.uniform(*MISSING))
    out = mask.copy()
    out[rows[cut], columns[cut]] = False
    return out


CORRUPTIONS: dict[str, Corruption] = {"rim": rim, "shift": shift, "inversion": invert, "missing part": missing}
SWAP = "swap"
KINDS: tuple[str, ...] = (*CORRUPTIONS, SWAP)


def corrupt(masks: np.ndarray, seed: int) -> tuple[np.ndarray, dict[int, str]]:
    """Corrupt SHARE of the masks (n, H, W) bool; the copy, and the kind of each corrupted one by its index."""
    random = np.random.default_rng(seed)
    lesions = np.flatnonzero(masks.any(axis=(1, 2)))
    chosen = random.choice(lesions, max(len(KINDS) * 2, round(SHARE * len(masks))), replace=False).tolist()
    kinds = {index: KINDS[number % len(KINDS)] for number, index in enumerate(chosen)}
    out = masks.copy()
    swapped = [index for index, kind in kinds.items() if kind == SWAP]
    swapped = swapped[: len(swapped) // 2 * 2]
    out[swapped] = masks[[swapped[number ^ 1] for number in range(len(swapped))]]  # in pairs
    for index, kind in kinds.items():
        if kind != SWAP:
            out[index] = CORRUPTIONS[kind](masks[index], random)
    return out, kinds


def by_audit(masks: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Score by `isicdist.audit`."""
    counts = sum((probability_histograms(*pair) for pair in zip(masks, levels, strict=True)), np.zeros((2, 256)))
    confidence = Confidence.of(counts)
    measures: list[Measures] = [measure(*pair, confidence) for pair in zip(masks, levels, strict=True)]
    names = [str(number) for number in range(len(masks))]
    scores = {finding.key: finding.score for finding in rank(names, names, measures)}
    return np.array([scores[name] for name in names])


def by_dice(masks: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Score by 1 - Dice of mask and prediction."""
    predictions = levels > 127
    total = masks.sum(axis=(1, 2)) + predictions.sum(axis=(1, 2))
    return 1 - 2 * (masks & predictions).sum(axis=(1, 2)) / np.maximum(total, 1)


def by_cleanlab(method: str) -> Ranking:
    """Score by cleanlab, whose quality is low for a bad label."""

    def score(masks: np.ndarray, levels: np.ndarray) -> np.ndarray:
        lesion = levels.astype(np.float32) / 255
        probs = np.stack([1 - lesion, lesion], axis=1)  # (n, 2, H, W)
        labels = masks.astype(np.int64)
        # One job: the processes that it would start take a second for each image.
        quality, _ = cleanlab.get_label_quality_scores(labels, probs, method=method, verbose=False, n_jobs=1)
        return -np.asarray(quality)

    return score


RANKINGS: dict[str, Ranking] = {
    "isicdist": by_audit,
    "dice": by_dice,
    "cleanlab softmin": by_cleanlab("softmin"),
    "cleanlab pixels": by_cleanlab("num_pixel_issues"),
}


def held_out(data: str, runs: Path) -> tuple[np.ndarray, np.ndarray]:
    """Predict the images of train and val: masks (n, H, W) bool, probabilities (n, H, W) uint8."""
    accelerator = launch.start(launch.MAX_IDLE_SECONDS, probe_cpu=faster_cpu_precision)
    shards, ensemble = ShardSet.open(data), load_ensemble([runs])
    parts = [part for part in held_out_splits(shards, runs, ensemble) if part.predictor is not ensemble]
    ensemble.prepare(accelerator)
    size = ensemble.input_spec.size
    levels = np.zeros((sum(len(part.split) for part in parts), size, size), np.uint8)
    samples = predict(parts, accelerator, levels, lambda done: None)
    return np.stack([sample.mask() for sample in samples]), levels


def average_precision(scores: np.ndarray, corrupted: np.ndarray) -> float:
    """Area under the curve of precision over recall, as steps."""
    found = corrupted[np.argsort(-scores, kind="stable")]
    precision = np.cumsum(found) / np.arange(1, len(found) + 1)
    return float(precision[found].mean())


def table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows as a table of Markdown; the first is the head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def main() -> None:
    """Compare the rankings and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--run", required=True, type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    masks, levels = held_out(options.data, options.run)
    recalls = {name: {kind: [0.0] * 0 for kind in ("all", *KINDS)} for name in RANKINGS}
    areas = {name: [0.0] * 0 for name in RANKINGS}
    seconds = {name: [0.0] * 0 for name in RANKINGS}
    kinds: dict[int, str] = {}
    for seed in range(options.seeds):
        bad, kinds = corrupt(masks, seed)
        is_corrupted = np.isin(np.arange(len(masks)), list(kinds))
        for name, ranking in RANKINGS.items():
            start = time.perf_counter()
            scores = ranking(bad, levels)
            seconds[name].append(time.perf_counter() - start)
            top = set(np.argsort(-scores, kind="stable")[: len(kinds)].tolist())
            areas[name].append(average_precision(scores, is_corrupted))
            for kind in ("all", *KINDS):
                members = [index for index, each in kinds.items() if kind in ("all", each)]
                recalls[name][kind].append(sum(index in top for index in members) / len(members))
    print(f"{date.today()}, {platform.processor() or platform.machine()}, cleanlab {version('cleanlab')}")
    print(f"{len(masks)} pairs, {len(kinds)} of them corrupted, {options.seeds} seeds\n")
    rows: list[Sequence[str]] = [("ranking", "precision = recall at 5 %", "average precision", *KINDS, "seconds")]
    for name in RANKINGS:
        whole = recalls[name]["all"]
        spread = statistics.stdev(whole) if len(whole) > 1 else 0.0
        by_kind = (f"{statistics.mean(recalls[name][kind]):.2f}" for kind in KINDS)
        precision, took = statistics.mean(areas[name]), statistics.median(seconds[name])
        rows.append((name, f"{statistics.mean(whole):.3f} ± {spread:.3f}", f"{precision:.3f}", *by_kind, f"{took:.1f}"))
    print(table(rows))


if __name__ == "__main__":
    main()
