"""Scoring a model on a split: every image once, on however many processes, into one exact summary."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from rich.progress import Progress
from torch import Tensor, nn

from isicdist import processes
from isicdist.augment import MEAN, STD, normalise, to_unit
from isicdist.checkpoint import load_model
from isicdist.dice import DiceReduction, DiceSummary
from isicdist.order import BatchPlan
from isicdist.original import OriginalReduction, has_originals
from isicdist.results import Results, Subgroups
from isicdist.stream import Stream
from isicdist.thresholds import ThresholdReduction
from shards.errors import CheckpointError
from shards.reader import ShardSet, Split

if TYPE_CHECKING:
    from accelerate import Accelerator


class Counter(Protocol):
    """Something that counts each batch beside `DiceReduction`, with the same call."""

    def update(self, logits: Tensor, masks: Tensor, ids: Tensor, valid: Tensor) -> None:
        """Count one batch: logits and masks (B, 1, H, W), sample numbers (B,), places that hold an image (B,)."""
        ...


@torch.inference_mode()
def score(
    model: nn.Module,
    split: Split,
    accelerator: Accelerator,
    *,
    micro_size: int = 16,
    workers: int = 2,
    threshold: float = 0.5,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
    progress: Progress | None = None,
    beside: Sequence[Counter] = (),
) -> DiceSummary:
    """The exact scores of `model` on `split` at the network's resolution; every rank calls it and gets the same.

    `micro_size`: images of one forward pass. `threshold`: the probability above which a pixel is lesion.
    `beside`: what else is to see every batch; the caller reduces it.
    """
    world = accelerator.num_processes
    plan = BatchPlan(global_size=micro_size * world, micro_size=micro_size, world_size=world)
    reduction = DiceReduction(expected=len(split), threshold=threshold)
    training = model.training
    model.eval()
    with Stream(split, plan, accelerator.process_index, workers=workers, device=accelerator.device) as stream:
        task = progress.add_task(f"evaluate {split.name}", total=len(split)) if progress else None
        for batch in stream.in_order():
            logits = model(normalise(to_unit(batch.images), mean, std))
            numbers, valid = torch.from_numpy(batch.numbers), torch.from_numpy(batch.valid)
            for counter in (reduction, *beside):
                counter.update(logits, batch.masks, numbers, valid)
            if progress and task is not None:
                progress.advance(task, batch.step_samples)
    model.train(training)
    return reduction.reduce(accelerator)


def evaluate(
    checkpoint: Path, data: str, split_name: str, metadata: str | None = None
) -> tuple[DiceSummary, Path] | None:
    """Score RUN/best on a split and write RUN/evaluation/<split>/; None on all ranks but the main one.

    The summary is of the network's resolution; what is written has the original resolution's scores, too, where
    the split carries the original masks. `metadata`: FILE.csv:COLUMN, whose values the images are told apart by.
    """
    accelerator = processes.start()
    model, card = load_model(checkpoint)
    shards = ShardSet.open(data)
    if shards.size != card["size"]:
        raise CheckpointError(
            f"{checkpoint}: trained on images of {card['size']} pixels, but {data} holds {shards.size}; "
            f"build the set with --size {card['size']}"
        )
    split = shards.split(split_name)
    subgroups = Subgroups.read(metadata, split) if metadata else None
    wrapped = accelerator.prepare_model(model, evaluation_mode=True)
    thresholds = ThresholdReduction(accelerator.device)
    with ExitStack() as opened:
        progress = opened.enter_context(Progress(disable=not accelerator.is_main_process))
        original = None
        if has_originals(split):
            original = opened.enter_context(OriginalReduction(split, threshold=card["threshold"]))
        summary = score(
            wrapped,
            split,
            accelerator,
            threshold=card["threshold"],
            mean=tuple(card["mean"]),
            std=tuple(card["std"]),
            progress=progress,
            beside=[thresholds, original] if original else [thresholds],
        )
        results = Results(
            split=split,
            card=card,
            network=summary,
            original=original.reduce(accelerator) if original else None,
            curve=thresholds.reduce(accelerator),
            subgroups=subgroups,
        )
    if not accelerator.is_main_process:
        return None
    run = checkpoint.parent if checkpoint.name == "best" else checkpoint  # the next best model replaces RUN/best
    out = run / "evaluation" / split_name
    results.write(out)
    from isicdist.pictures import draw_examples  # late: matplotlib is only for those who look

    draw_examples(model, card, split, summary, out / "examples.png", accelerator.device)
    return summary, out
