"""Evaluation of a model on a split: every image once, on any number of processes, reduced to one exact summary."""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from isicdist.config import Fold, Tta, precision_name
from isicdist.data.folds import POOLED_SPLITS, merged_groups, open_fold
from isicdist.distributed import launch
from isicdist.distributed.agree import raise_on_lost_rank
from isicdist.errors import CheckpointError
from isicdist.metrics.dice import DEFAULT_THRESHOLD, SCORE_NAMES, DiceReduction, DiceSummary, per_image_scores
from isicdist.metrics.examples import EXAMPLES_FOLDER, Example, Predictor, select_examples, write_examples
from isicdist.metrics.original import OriginalReduction, has_originals
from isicdist.metrics.results import Exclusions, Results, Subgroups, ThresholdScores
from isicdist.metrics.summary import Relation
from isicdist.metrics.thresholds import ThresholdReduction
from isicdist.network.best import ModelMetadata
from isicdist.network.cpu_precision import faster_cpu_precision
from isicdist.network.ensemble import Ensemble, load_ensemble
from isicdist.network.segmenter import InputSpec, Segmenter
from isicdist.run_folder import BEST_FOLDER, EVALUATION_FOLDER
from isicdist.training.scoring import Metric, score
from isicdist.training.tracking import EvaluationDetails, EvaluationMetrics, Tracker
from shards import format
from shards.errors import ShardSetError, UsageError
from shards.mask_statistics import mask_warnings
from shards.progress import progress
from shards.reader import ShardSet, Split

ISIC_ID = re.compile(rb"ISIC_[0-9]{7}")
"""Key that names one photograph in every set."""


@raise_on_lost_rank()
def evaluate(
    checkpoint: Path | Sequence[Path],
    data: str,
    scored: str | Fold,
    *,
    metadata: str | None = None,
    tta: Tta = "off",
    exclude: Path | None = None,
    out: Path | None = None,
) -> tuple[Results, Path] | None:
    """Score RUN/best on the split `scored`, or on the held-out images of a fold, and write RUN/evaluation/<split>/.

    Returns the results and that folder; None on all ranks but the main one. Scores are computed at 0.5 and at the
    model's own threshold, at the network's resolution and, where the split carries the original masks, at the original
    one; the dashboards of the run show them, too.
    `checkpoint`: a run or, for an ensemble, several, or the folder of a cross-validation (`load_ensemble`); then each
    model is scored alone, too. `metadata`: FILE.csv:COLUMN; the images of each value are scored as a subgroup, too.
    `tta`: test-time augmentation that the probabilities are averaged over. `exclude`: a table of `shards.exclusions`;
    the scores without its images are added. `out`: the folder to write instead, needed for several runs.
    Raises CheckpointError for a model that is missing, damaged, trained on images of another size or resize mode, or
    that outputs NaN, ShardSetError for a set that is incomplete, damaged or has no masks, UsageError for a split of
    which the model has seen images in training and for another mistake of the user.
    """
    runs = [checkpoint] if isinstance(checkpoint, Path) else list(checkpoint)
    if out is None and len(runs) > 1:
        raise UsageError("--ensemble of several runs: give --out, the folder for the scores")
    accelerator = launch.start(launch.MAX_IDLE_SECONDS, probe_cpu=faster_cpu_precision)
    ensemble, label = load_ensemble(runs), ", ".join(map(str, runs))
    split, groups = _open_unseen(ShardSet.open(data), scored, ensemble, label)
    relation = relate(ensemble, split)
    subgroups = Subgroups.read(metadata, split) if metadata else None
    exclusions = Exclusions.read(exclude, split) if exclude else None
    ensemble.prepare(accelerator)
    predictor = functools.partial(ensemble, tta=tta)
    thresholds, workers = (DEFAULT_THRESHOLD, ensemble.threshold), launch.worker_threads()
    tuned = DiceReduction(expected=len(split), threshold=ensemble.threshold)
    curve = ThresholdReduction(accelerator.device)
    passes = 1 + (len(ensemble.members) if len(ensemble.members) > 1 else 0)
    with ExitStack() as opened:
        shown = accelerator.is_main_process
        report = opened.enter_context(progress(f"evaluate {split.name}", "images", shown=shown))
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
                progress=lambda done: report(number * len(split) + done, passes * len(split)),
                metrics=metrics,
            )

        network = score_pass(predictor, 0, metrics)
        original_default, original_tuned = original.reduce(accelerator) if original else (None, None)
        at_default = ThresholdScores(threshold=DEFAULT_THRESHOLD, network=network, original=original_default)
        at_tuned = ThresholdScores(
            threshold=ensemble.threshold, network=tuned.reduce(accelerator), original=original_tuned
        )
        all_thresholds = curve.reduce(accelerator)
        alone = {
            name: score_pass(functools.partial(member, tta=tta), number)
            for number, (name, member) in enumerate(zip(ensemble.names, ensemble.members, strict=True), start=1)
            if passes > 1
        }
    accelerator.end_training()  # a process that ends with its group still up may abort
    if all_thresholds.undefined:
        raise CheckpointError(
            f"{label}: {all_thresholds.undefined} pixels of split {split.name} get no probability (NaN): "
            "the network overflows; launch with --mixed_precision no or bf16, or train again"
        )
    if not accelerator.is_main_process:
        return None
    results = Results(
        split=split,
        groups=groups,
        step=max(member.metadata.step for member in ensemble.members),
        tta=tta,
        relation=relation,
        precision=precision_name(accelerator.mixed_precision),
        models=tuple(member.metadata.sha256 for member in ensemble.members),
        at_default=at_default,
        at_tuned=at_tuned,
        curve=all_thresholds,
        subgroups=subgroups,
        members=alone,
        exclusions=exclusions,
    )
    run = runs[0].parent if runs[0].name == BEST_FOLDER else runs[0]  # the next best model replaces RUN/best
    out = out or run / EVALUATION_FOLDER / split.name
    examples = select_examples(predictor, results, accelerator.device)
    _write(results, examples, out)
    if not results.members:
        _log_to_dashboards(run, results, examples)
    return results, out


def _open_unseen(shards: ShardSet, scored: str | Fold, ensemble: Ensemble, label: str) -> tuple[Split, list[str]]:
    """Open what is scored, and give the group of each image; check all that does not need a forward pass."""
    name_of_split = scored.name if isinstance(scored, Fold) else scored
    for name, member in zip(ensemble.names, ensemble.members, strict=True):
        if member.metadata.data_digest == shards.digest or member.seen is None:
            _check_split_name(member.metadata, name_of_split, name)
    split = open_fold(shards, scored)[1] if isinstance(scored, Fold) else shards.split(scored)
    check_scored(split, shards, ensemble.input_spec, label)
    return split, merged_groups(shards, split)


def _write(results: Results, examples: Sequence[Example], out: Path) -> None:
    """Write the scores, curves and pictures into a folder, and print what is wrong with the masks."""
    results.write(out)
    for line in mask_warnings(results.split):
        print(f"warning: {line}", file=sys.stderr)
    write_examples(examples, out / EXAMPLES_FOLDER)
    from isicdist.metrics.figures import draw_examples

    draw_examples(examples, out / "examples.png")


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


def _check_split_name(model: ModelMetadata, split: str, checkpoint: str) -> None:
    """Raise UsageError for a held-out score on a split, of the set of the model, that it was trained on."""
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


def relate(ensemble: Ensemble, split: Split) -> Relation:
    """Find out how the models, of which one that has seen more decides, relate to the images of a split.

    Raises UsageError for images of another split than train, in another shard set, that a model was trained on. Only an
    ISIC id names one photograph everywhere: other names that are the same make no more than a relation.
    """
    found: set[Relation] = set()
    are_isic_ids = np.array([ISIC_ID.fullmatch(key) is not None for key in split.table["key"].tolist()])
    for name, member in zip(ensemble.names, ensemble.members, strict=True):
        trained = member.seen.trained_in(split) if member.seen else np.zeros(len(split), bool)
        known = int((trained & are_isic_ids).sum())
        if known and split.name != "train":
            raise UsageError(
                f"{name}: trained on {known} of the {len(split)} images of {split.name} in {split.location}, by their "
                "ISIC ids, as they were in another split of another set; score images that it has not seen"
            )
        found.add(_relation(member, split, bool(trained.any())))
    by_severity: tuple[Relation, ...] = ("trained on", "chosen on", "unknown", "held out")
    return next(relation for relation in by_severity if relation in found)


def _relation(member: Segmenter, split: Split, trained: bool) -> Relation:
    """Give the relation of one model; `trained`: it was trained on images of the same names."""
    if member.seen:
        validated = member.seen.validated_in(split).any()
        return "trained on" if trained else "chosen on" if validated else "held out"
    if member.metadata.data_digest != split.digest:
        return "unknown"
    if split.name == "train":
        return "trained on"
    return "chosen on" if split.name == member.metadata.score.split else "held out"


def check_scored(split: Split, shards: ShardSet, expected: InputSpec, label: str) -> None:
    """Check that a split of an open set can be scored by the model or the ensemble `label`.

    Raises CheckpointError where its images are not resized as those that the model was trained on, ShardSetError where
    it has no image, one twice, or one without a mask.
    """
    if shards.size != expected.size:
        raise CheckpointError(
            f"{label}: trained on images of {expected.size} pixels, but {shards.location} holds "
            f"{shards.size or 'all sizes'}; build the set with --size {expected.size}"
        )
    if shards.fit != expected.mode:
        raise CheckpointError(
            f"{label}: trained on images resized by {expected.mode}, but {shards.location} was built with --fit "
            f"{shards.fit}; build the set with --fit {expected.mode}"
        )
    keys, times = np.unique(split.table["key"], return_counts=True)
    unmasked = split.table["key"][split.table["size"][:, format.MASK] == 0]
    where = f"{shards.location}: split {split.name}"
    if len(split) == 0:
        raise ShardSetError(f"{where} holds no image; build the set again")
    if len(keys) < len(split):
        raise ShardSetError(f"{where} holds {keys[times > 1][0].decode()} twice; build the set again")
    if len(unmasked):
        raise ShardSetError(
            f"{where}: {len(unmasked)} images have no mask, the first {unmasked[0].decode()}; "
            "without the truth nothing can be scored, but isicdist predict draws masks"
        )
