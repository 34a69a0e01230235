"""Scoring a model on a split: every image once, on however many processes, into one exact summary."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor, nn

from isicdist.config import Tta
from isicdist.data.decoded_cache import DecodedCache
from isicdist.data.order import BatchPlan
from isicdist.data.stream import Stream
from isicdist.distributed import launch
from isicdist.distributed.agree import raise_on_lost_rank
from isicdist.errors import CheckpointError, StoppedError
from isicdist.metrics.dice import DEFAULT_THRESHOLD, DiceReduction, DiceSummary
from isicdist.metrics.original import OriginalReduction, has_originals
from isicdist.metrics.results import Results, Subgroups, ThresholdScores
from isicdist.metrics.thresholds import ThresholdReduction
from isicdist.network.normalise import normalise, to_unit
from isicdist.network.segmenter import load_model
from shards import format
from shards.errors import ShardSetError
from shards.reader import ShardSet, Split

if TYPE_CHECKING:
    from accelerate import Accelerator

Predictor = Callable[[Tensor], Tensor]
"""Gives probabilities (B, 1, H, W) float32 of images (B, 3, H, W) uint8."""


class Counter(Protocol):
    """Something that counts each batch beside `DiceReduction`, with the same call."""

    def update(self, probs: Tensor, masks: Tensor, ids: Tensor, valid: Tensor) -> None:
        """Count one batch: probs and masks (B, 1, H, W), sample numbers (B,), places that hold an image (B,)."""
        ...


@torch.inference_mode()
def score(
    predictor: Predictor,
    split: Split,
    accelerator: Accelerator,
    *,
    micro_size: int = 16,
    workers: int = 2,
    progress: Progress | None = None,
    beside: Sequence[Counter] = (),
    decoded: DecodedCache | None = None,
) -> DiceSummary:
    """The exact scores at 0.5 and the network's resolution; every rank calls it and gets the same.

    `micro_size`: images of one forward pass. `beside`: what else is to see every batch; the caller reduces it.
    `decoded`: where the samples of `split` are kept.
    """
    world = accelerator.num_processes
    plan = BatchPlan(global_size=micro_size * world, micro_size=micro_size, world_size=world)
    reduction = DiceReduction(expected=len(split), threshold=DEFAULT_THRESHOLD)
    rank, device = accelerator.process_index, accelerator.device
    with Stream(split, plan, rank, workers=workers, device=device, decoded=decoded) as stream:
        task = progress.add_task(f"evaluate {split.name}", total=len(split)) if progress else None
        for batch in stream.sequential_pass():
            probs = predictor(batch.images)
            numbers, valid = torch.from_numpy(batch.indices), torch.from_numpy(batch.valid)
            for counter in (reduction, *beside):
                counter.update(probs, batch.masks, numbers, valid)
            if progress and task is not None:
                progress.advance(task, batch.step_samples)
    return reduction.reduce(accelerator)


def validate(
    network: nn.Module,
    split: Split,
    accelerator: Accelerator,
    *,
    micro_size: int,
    decoded: DecodedCache | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[DiceSummary, float]:
    """The scores at 0.5, and the threshold of the highest pooled Dice; every rank calls it and gets the same.

    `network` gives logits of normalised images; it is put in evaluation mode. `decoded`: where the samples of `split`
    are kept.
    Raises StoppedError on every rank when `stop`, asked before each batch and with the same answer on all, says so.
    """

    def predictor(images: Tensor) -> Tensor:
        if stop():
            raise StoppedError(f"stopped in the middle of an evaluation of {split.name}")
        return network(normalise(to_unit(images))).float().sigmoid()

    thresholds = ThresholdReduction(accelerator.device)
    network.eval()
    summary = score(predictor, split, accelerator, micro_size=micro_size, beside=[thresholds], decoded=decoded)
    return summary, thresholds.reduce(accelerator).best_threshold


@raise_on_lost_rank()
def evaluate(
    checkpoint: Path, data: str, split_name: str, *, metadata: str | None = None, tta: Tta = "off"
) -> tuple[DiceSummary, Path] | None:
    """Score RUN/best on a split and write RUN/evaluation/<split>/; None on all ranks but the main one.

    The summary is of 0.5 and the network's resolution; all the others are written.
    Scores are taken at 0.5 and at the model's own threshold, at the network's resolution and, where the split
    carries the original masks, at the original one. `metadata`: FILE.csv:COLUMN, whose values the images are told
    apart by. `tta`: which mirrored and turned copies the probabilities are the mean of.
    """
    accelerator = launch.start()
    model = load_model(checkpoint)
    split = _open_split(data, split_name, model.view[1], checkpoint)
    subgroups = Subgroups.read(metadata, split) if metadata else None
    model.network = accelerator.prepare_model(model.network, evaluation_mode=True)
    predictor = functools.partial(model, tta=tta)
    own = DiceReduction(expected=len(split), threshold=model.threshold)
    curve = ThresholdReduction(accelerator.device)
    with ExitStack() as opened:
        progress = opened.enter_context(Progress(disable=not accelerator.is_main_process))
        original = None
        if has_originals(split):
            original = opened.enter_context(OriginalReduction(split, thresholds=(DEFAULT_THRESHOLD, model.threshold)))
        beside = [own, curve, original] if original else [own, curve]
        network = score(predictor, split, accelerator, progress=progress, beside=beside)
        at_half, at_own = original.reduce(accelerator) if original else (None, None)
        results = Results(
            split=split,
            step=model.card["step"],
            tta=tta,
            half=ThresholdScores(threshold=DEFAULT_THRESHOLD, network=network, original=at_half),
            own=ThresholdScores(threshold=model.threshold, network=own.reduce(accelerator), original=at_own),
            curve=curve.reduce(accelerator),
            subgroups=subgroups,
        )
    accelerator.end_training()  # a process that ends with its group still up may abort
    if results.curve.undefined:
        raise CheckpointError(
            f"{checkpoint}: {results.curve.undefined} pixels of split {split_name} get no probability (NaN): "
            "the network overflows; launch with --mixed_precision no or bf16, or train again"
        )
    if not accelerator.is_main_process:
        return None
    run = checkpoint.parent if checkpoint.name == "best" else checkpoint  # the next best model replaces RUN/best
    out = run / "evaluation" / split_name
    results.write(out)
    from isicdist.metrics.figures import draw_examples

    draw_examples(predictor, results, out / "examples.png", accelerator.device)
    return network, out


def _open_split(data: str, name: str, size: int, checkpoint: Path) -> Split:
    """The split, when it can be scored: images of `size` pixels, at least one, each with its mask and its own key."""
    shards = ShardSet.open(data)
    split = shards.split(name)
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
