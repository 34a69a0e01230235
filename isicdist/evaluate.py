"""Scoring a model on a split: every image once, on however many processes, into one exact summary."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import Progress
from torch import nn

from isicdist import processes
from isicdist.augment import MEAN, STD, normalise, to_unit
from isicdist.checkpoint import load_model
from isicdist.dice import DiceReduction, DiceSummary, per_image_scores
from isicdist.order import BatchPlan
from isicdist.stream import Stream
from shards.errors import CheckpointError
from shards.reader import ShardSet, Split

if TYPE_CHECKING:
    from accelerate import Accelerator


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
) -> DiceSummary:
    """The exact scores of `model` on `split` at the network's resolution; every rank calls it and gets the same.

    `micro_size`: images of one forward pass. `threshold`: the probability above which a pixel is lesion.
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
            reduction.update(logits, batch.masks, numbers, valid)
            if progress and task is not None:
                progress.advance(task, batch.step_samples)
    model.train(training)
    return reduction.reduce(accelerator)


def evaluate(checkpoint: Path, data: str, split_name: str) -> tuple[DiceSummary, Path] | None:
    """Score RUN/best on a split and write RUN/evaluation/<split>/; None on all ranks but the main one."""
    accelerator = processes.start()
    model, card = load_model(checkpoint)
    shards = ShardSet.open(data)
    if shards.size != card["size"]:
        raise CheckpointError(
            f"{checkpoint}: trained on images of {card['size']} pixels, but {data} holds {shards.size}; "
            f"build the set with --size {card['size']}"
        )
    split = shards.split(split_name)
    wrapped = accelerator.prepare_model(model, evaluation_mode=True)
    with Progress(disable=not accelerator.is_main_process) as progress:
        summary = score(
            wrapped,
            split,
            accelerator,
            threshold=card["threshold"],
            mean=tuple(card["mean"]),
            std=tuple(card["std"]),
            progress=progress,
        )
    if not accelerator.is_main_process:
        return None
    out = checkpoint / "evaluation" / split_name
    _write(out, summary, split, card)
    from isicdist.pictures import draw_examples  # late: matplotlib is only for those who look

    draw_examples(model, card, split, summary, out / "examples.png", accelerator.device)
    return summary, out


def _write(out: Path, summary: DiceSummary, split: Split, card: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "split": split.name,
        "data_digest": split.digest,
        "resolution": split.size,
        "threshold": card["threshold"],
        "model_step": card["step"],
        **summary.scores(),
    }
    (out / "summary.json").write_text(json.dumps(record, indent=1) + "\n")
    dice, jaccard = per_image_scores(summary.rows)
    with (out / "per_image.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "tp", "fp", "fn", "dice", "jaccard"])
        for (number, tp, fp, fn), d, j in zip(summary.rows.tolist(), dice.tolist(), jaccard.tolist(), strict=True):
            writer.writerow([split.key(number), tp, fp, fn, d, j])
