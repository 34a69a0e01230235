"""Scoring of every image of a split once, on any number of processes, in training and in `isicdist evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from isicdist.data.decoded_cache import DecodedCache
from isicdist.data.order import BatchPlan
from isicdist.data.stream import Stream
from isicdist.errors import StoppedError, TrainingError
from isicdist.metrics.dice import DEFAULT_THRESHOLD, DiceReduction, DiceSummary
from isicdist.metrics.examples import Predictor
from isicdist.metrics.thresholds import ThresholdCurve, ThresholdReduction
from isicdist.network.normalise import normalise, to_unit
from isicdist.training.micro_batch import evaluation_micro_size, is_out_of_memory
from shards.reader import Split

if TYPE_CHECKING:
    from accelerate import Accelerator


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
