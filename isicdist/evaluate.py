"""Evaluation of a model on a split: every image once, on any number of processes, reduced to one exact summary."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor, nn

from isicdist.config import Fold, Tta
from isicdist.data.decoded_cache import DecodedCache
from isicdist.data.folds import POOLED_SPLITS, open_fold
from isicdist.data.order import BatchPlan
from isicdist.data.stream import Stream
from isicdist.distributed import launch
from isicdist.distributed.agree import raise_on_lost_rank
from isicdist.errors import CheckpointError, StoppedError, TrainingError
from isicdist.metrics.dice import DEFAULT_THRESHOLD, SCORE_NAMES, DiceReduction, DiceSummary, per_image_scores
from isicdist.metrics.examples import EXAMPLES_FOLDER, Example, select_examples, write_examples
from isicdist.metrics.original import OriginalReduction, has_originals
from isicdist.metrics.results import Exclusions, Results, Subgroups, ThresholdScores
from isicdist.metrics.thresholds import ThresholdCurve, ThresholdReduction
from isicdist.network.best import ModelMetadata
from isicdist.network.cpu_precision import faster_cpu_precision
from isicdist.network.ensemble import load_ensemble
from isicdist.network.normalise import normalise, to_unit
from isicdist.training.micro_batch import evaluation_micro_size, is_out_of_memory
from isicdist.training.tracking import EvaluationDetails, EvaluationMetrics, Tracker
from shards import format
from shards.errors import ShardSetError, UsageError
from shards.mask_statistics import mask_warnings
from shards.reader import ShardSet, Split

if TYPE_CHECKING:
    from accelerate import Accelerator

Predictor = Callable[[Tensor], Tensor]
"""Function that returns probabilities (B, 1, H, W) float32 in [0, 1] for images (B, 3, H, W) uint8."""


class Metric(Protocol):
    """Metric that accumulates batches, such as `DiceReduction`; it ignores the arguments that it does not need."""

    def update(self, probs: Tensor, masks: Tensor, ids: Tensor, valid: Tensor) -> None:
        """Count one batch: probs and masks (B, 1, H, W), indices of samples (B,), slots that hold one (B,) bool."""
        ...


@torch.inference_mode()
def score(
    predictor: Predictor,
    split: Split,
    accelerator: Accelerator,
    *,
    micro_size: int | None = None,
    workers: int = 2,
    progress: Callable[[int], None] = lambda done: None,
    metrics: Sequence[Metric] = (),
    decoded: DecodedCache | None = None,
) -> DiceSummary:
    """Compute the exact scores at 0.5 and the network's resolution. Every rank must call it; all get the same.

    `micro_size`: images of one forward pass on one rank (None: `evaluation_micro_size`). `workers`: decoding
    threads of this rank. `progress`: called after each batch with the number of images that all ranks have evaluated so
    far. `metrics`: further metrics to update with every batch; the caller reduces them. `decoded`: cache of the decoded
    samples of `split`.
    Raises ShardSetError for data that cannot be read, ValueError when `predictor` returns logits, TrainingError when it
    is out of memory.
    """
    world, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    micro_size = micro_size or evaluation_micro_size("auto", split.size or 1, device)
    plan = BatchPlan(global_size=micro_size * world, micro_size=micro_size, world_size=world)
    dice = DiceReduction(expected=len(split), threshold=DEFAULT_THRESHOLD)
    with Stream(split, plan, rank, workers=workers, device=device, decoded=decoded) as stream:
        done = 0
        for batch in stream.sequential_pass():
            try:
                probs = predictor(batch.images)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise TrainingError(
                    f"out of memory with {micro_size} images of {split.name} at once: evaluate in bf16, on a device "
                    "with more memory or, in training, with a smaller --batch.micro-size"
                ) from error
            for metric in (dice, *metrics):
                metric.update(probs, batch.masks, batch.ids, batch.valid)
            done += batch.step_samples
            progress(done)
    return dice.reduce(accelerator)


def validate(
    network: nn.Module,
    split: Split,
    accelerator: Accelerator,
    *,
    micro_size: int,
    workers: int = 2,
    decoded: DecodedCache | None = None,
    progress: Callable[[int], None] = lambda done: None,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[DiceSummary, ThresholdCurve]:
    """Evaluate a network in training: the scores at 0.5, and the pooled scores at every threshold.

    Every rank must call it; all get the same. `network` maps normalised images to logits; it is put in evaluation mode.
    `micro_size`, `workers`, `decoded` and `progress` are those of `score`.
    Raises StoppedError on every rank when `stop`, called before each batch, returns True (on all ranks alike).
    """

    def predict_unless_stopped(images: Tensor) -> Tensor:
        if stop():
            raise StoppedError(f"stopped in the middle of an evaluation of {split.name}")
        return predict_probs(network, images)

    thresholds = ThresholdReduction(accelerator.device)
    network.eval()
    summary = score(
        predict_unless_stopped,
        split,
        accelerator,
        micro_size=micro_size,
        workers=workers,
        progress=progress,
        metrics=[thresholds],
        decoded=decoded,
    )
    return summary, thresholds.reduce(accelerator)


def predict_probs(network: nn.Module, images: Tensor) -> Tensor:
    """Predict probabilities (B, 1, H, W) float32 for images (B, 3, H, W) uint8 by a network in evaluation mode."""
    return network(normalise(to_unit(images))).float().sigmoid()


@raise_on_lost_rank()
def evaluate(
    checkpoint: Path | Sequence[Path],
    data: str,
    split_name: str,
    *,
    fold: Fold | None = None,
    metadata: str | None = None,
    tta: Tta = "off",
    exclude: Path | None = None,
    out: Path | None = None,
) -> tuple[Results, Path] | None:
    """Score RUN/best on a split, or on the held-out images of a fold, and write RUN/evaluation/<split>/.

    Returns the results and that folder; None on all ranks but the main one. Scores are computed at 0.5 and at the
    model's own threshold, at the network's resolution and, where the split carries the original masks, at the original
    one; the dashboards of the run show them, too.
    `checkpoint`: a run or, for an ensemble, several, or the folder of a cross-validation (`load_ensemble`); then each
    model is scored alone, too. `metadata`: FILE.csv:COLUMN; the images of each value are scored as a subgroup, too.
    `tta`: test-time augmentation that the probabilities are averaged over. `exclude`: a table of `shards.exclusions`;
    the scores without its images are added. `out`: the folder to write instead, needed for several runs.
    Raises CheckpointError for a model that is missing, damaged, trained on another size or that outputs NaN,
    ShardSetError for a set that is incomplete, damaged or has no masks, UsageError for another mistake of the user.
    """
    runs = [checkpoint] if isinstance(checkpoint, Path) else list(checkpoint)
    if out is None and len(runs) > 1:
        raise UsageError("--ensemble of several runs: give --out, the folder for the scores")
    accelerator = launch.start(launch.MAX_IDLE_SECONDS, probe_cpu=faster_cpu_precision)
    ensemble = load_ensemble(runs)
    for name, member in zip(ensemble.names, ensemble.members, strict=True):
        _check_unseen(member.metadata, fold.name if fold else split_name, name)
    label = ", ".join(map(str, runs))
    split = open_scored_split(data, split_name, fold, ensemble.input_spec.size, label)
    subgroups = Subgroups.read(metadata, split) if metadata else None
    exclusions = Exclusions.read(exclude, split) if exclude else None
    ensemble.prepare(accelerator)
    predictor = functools.partial(ensemble, tta=tta)
    thresholds, workers = (DEFAULT_THRESHOLD, ensemble.threshold), launch.worker_threads()
    tuned = DiceReduction(expected=len(split), threshold=ensemble.threshold)
    curve = ThresholdReduction(accelerator.device)
    passes = 1 + (len(ensemble.members) if len(ensemble.members) > 1 else 0)
    with ExitStack() as opened:
        bar = opened.enter_context(Progress(disable=not (accelerator.is_main_process and sys.stdout.isatty())))
        task = bar.add_task(f"evaluate {split_name}", total=passes * len(split))
        original = None
        if has_originals(split):
            original = opened.enter_context(OriginalReduction(split, thresholds=thresholds, workers=workers))
        metrics = [tuned, curve, original] if original else [tuned, curve]

        def score_pass(predictor: Predictor, number: int, metrics: Sequence[Metric] = ()) -> DiceSummary:
            return score(
                predictor,
                split,
                accelerator,
                workers=workers,
                progress=lambda done: bar.update(task, completed=number * len(split) + done),
                metrics=metrics,
            )

        network = score_pass(predictor, 0, metrics)
        original_default, original_tuned = original.reduce(accelerator) if original else (None, None)
        results = Results(
            split=split,
            step=max(member.metadata.step for member in ensemble.members),
            tta=tta,
            at_default=ThresholdScores(threshold=DEFAULT_THRESHOLD, network=network, original=original_default),
            at_tuned=ThresholdScores(
                threshold=ensemble.threshold, network=tuned.reduce(accelerator), original=original_tuned
            ),
            curve=curve.reduce(accelerator),
            subgroups=subgroups,
            members={
                name: score_pass(functools.partial(member, tta=tta), number)
                for number, (name, member) in enumerate(zip(ensemble.names, ensemble.members, strict=True), start=1)
                if passes > 1
            },
            exclusions=exclusions,
        )
    accelerator.end_training()  # a process that ends with its group still up may abort
    if results.curve.undefined:
        raise CheckpointError(
            f"{label}: {results.curve.undefined} pixels of split {split_name} get no probability (NaN): "
            "the network overflows; launch with --mixed_precision no or bf16, or train again"
        )
    if not accelerator.is_main_process:
        return None
    run = runs[0].parent if runs[0].name == "best" else runs[0]  # the next best model replaces RUN/best
    out = out or run / "evaluation" / split.name
    results.write(out)
    for line in mask_warnings(split):
        print(f"warning: {line}", file=sys.stderr)
    examples = select_examples(predictor, results, accelerator.device)
    write_examples(examples, out / EXAMPLES_FOLDER)
    from isicdist.metrics.figures import draw_examples

    draw_examples(examples, out / "examples.png")
    if not results.members:
        _log_to_dashboards(run, results, examples)
    return results, out


def _log_to_dashboards(run: Path, results: Results, examples: Sequence[Example]) -> None:
    """Add the scores, curves and pictures to the run's dashboards, such as its run at wandb."""
    scores = {name: float(value) for name, value in dataclasses.asdict(results.curve.summary()).items()}
    for at, prefix in ((results.at_default, ""), (results.at_tuned, "tuned_threshold_")):
        for resolution, summary in (("", at.network), ("original_", at.original)):
            if summary:
                scores |= {f"{prefix}{resolution}{name}": getattr(summary, name) for name in SCORE_NAMES}
    dice, _ = per_image_scores(results.at_tuned.finest.rows)
    details = EvaluationDetails(scores=scores, dice=dice, curve=results.curve, examples=examples)
    with Tracker.join(run) as tracker:
        network = results.at_default.network.scores()
        metrics = EvaluationMetrics(step=results.step, split=results.split.name, **network)
        tracker.log_evaluation(metrics, lambda: details)


def _check_unseen(model: ModelMetadata, split: str, checkpoint: str) -> None:
    """Raise UsageError for a held-out score on images that the model was trained on."""
    validated = model.score.split
    if split == validated or (split not in POOLED_SPLITS and not split.startswith("fold_")):
        return
    if split.startswith("fold_"):
        fold = "without --fold" if validated == "val" else f"with {validated} held out"
        raise UsageError(f"{checkpoint}: trained {fold}, so that it has seen images of {split}; score its own fold")
    if validated != "val":
        raise UsageError(
            f"{checkpoint}: trained with {validated} held out, so that it has seen images of {split}; "
            "score its fold (--fold), or --split test"
        )


def open_scored_split(data: str, name: str, fold: Fold | None, size: int, checkpoint: str) -> Split:
    """Open a split that can be scored: images of `size` pixels, at least one, each with its mask and its own key."""
    shards = ShardSet.open(data)
    split = open_fold(shards, fold)[1] if fold else shards.split(name)
    if shards.size != size:
        raise CheckpointError(
            f"{checkpoint}: trained on images of {size} pixels, but {data} holds {shards.size or 'all sizes'}; "
            f"build the set with --size {size}"
        )
    keys, times = np.unique(split.table["key"], return_counts=True)
    unmasked = split.table["key"][split.table["size"][:, format.MASK] == 0]
    if len(split) == 0:
        raise ShardSetError(f"{data}: split {name} holds no image; build the set again")
    if len(keys) < len(split):
        raise ShardSetError(f"{data}: split {name} holds {keys[times > 1][0].decode()} twice; build the set again")
    if len(unmasked):
        raise ShardSetError(
            f"{data}: {len(unmasked)} images of split {name} have no mask, the first {unmasked[0].decode()}; "
            "without the truth nothing can be scored, but isicdist predict draws masks"
        )
    return split
