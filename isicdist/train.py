"""Training: set-up, then one loop that reads from top to bottom.

All that is distributed about it is arithmetic in `isicdist.order` (who reads what) and two sums (the gradient, by
DDP; the logged counts, in `Interval.report`). With the global batch fixed, the loop does the same on any number
of processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import platform
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from isicdist import checkpoint, processes
from isicdist.augment import MEAN, STD, augment, normalise, to_unit
from isicdist.config import TrainConfig
from isicdist.dice import DiceSummary, count, pooled_dice
from isicdist.evaluate import score
from isicdist.loss import segmentation_loss
from isicdist.model import STRIDE, ImprovedUNet
from isicdist.order import BatchPlan, Purpose, sample_keys
from isicdist.processes import StopSignal
from isicdist.schedule import learning_rate
from isicdist.stream import Batch, Stream
from isicdist.tracking import Tracker
from shards.errors import CheckpointError, StoppedError, TrainingError, UsageError
from shards.reader import ShardSet, Split

if TYPE_CHECKING:
    from accelerate import Accelerator

REQUEUE_NAME = "REQUEUE"
"""In the run's folder while a run that a signal stopped waits to be started again."""


def train(config: TrainConfig, data: str, run: Path) -> DiceSummary | None:
    """Train on `data` into `run`; returns the last evaluation of the validation split.

    Every process that `accelerate launch` started calls it. Raises the errors of `shards.errors`.
    """
    accelerator = processes.start()
    shards = ShardSet.open(data)
    split, validation = shards.split("train"), shards.split("val")
    check_set(split, accelerator.num_processes)
    plan = plan_batches(config, accelerator.num_processes)
    model = build_model(config)
    optimizer = torch.optim.Adam(parameter_groups(model, config.optim.weight_decay), lr=config.optim.lr)
    accelerator.on_main_process(checkpoint.put_back_best)(run)
    start = _restore(config, run, model, optimizer)
    bare = model  # the same weights, without what DDP and autocast wrap around them
    model, optimizer = accelerator.prepare(model, optimizer)
    save, save_best = (accelerator.on_main_process(write) for write in (checkpoint.save, checkpoint.save_best))

    stream = Stream(
        split,
        plan,
        accelerator.process_index,
        seed=config.seed,
        window=config.stream.window or None,
        workers=config.stream.workers,
        prefetch=config.stream.prefetch,
        device=accelerator.device,
    )
    step, best = 0, -1.0
    if start:
        stream.load_state_dict(start.state["stream"])
        step, best = start.state["step"], start.state["best"]
    per_epoch = stream.steps_per_epoch
    total = min(config.epochs * per_epoch, config.steps or config.epochs * per_epoch)
    summary = None

    record, main = _record(config, shards, accelerator), accelerator.is_main_process
    with stream, StopSignal(accelerator) as stop, Tracker.open(run, record, main=main, total_steps=total) as tracker:
        tracker.truncate_after(step)
        accelerator.on_main_process((run / REQUEUE_NAME).unlink)(missing_ok=True)
        if start:
            tracker.note(f"resumed from {start.path.name}, step {step} of {total}")
        interval = Interval(accelerator, step)
        while step < total:
            epoch = stream.epoch_number
            for batch in interval.waiting(stream.epoch()):
                images, masks = to_unit(batch.images), batch.masks
                if config.augment.enabled:
                    keys = sample_keys(config.seed, epoch, batch.numbers, Purpose.AUGMENT)
                    images, masks = augment(images, masks, keys, config.augment)
                keys = torch.from_numpy(sample_keys(config.seed, step, batch.numbers, Purpose.DROPOUT))
                valid = torch.from_numpy(batch.valid).to(accelerator.device, non_blocking=True)

                with contextlib.nullcontext() if batch.last else accelerator.no_sync(model):
                    logits = model(normalise(images), keys.to(accelerator.device, non_blocking=True))
                    losses = segmentation_loss(logits, masks, config.optim.bce_weight)  # (B,)
                    loss = (losses * valid).sum() / batch.step_samples  # summed over ranks: the mean of the step
                    accelerator.backward(loss * plan.world_size)  # DDP divides by the world size
                interval.add(logits, masks, valid, loss.detach(), batch)
                if not batch.last:
                    continue

                lr = learning_rate(config.optim.schedule, config.optim.lr, step, total, per_epoch)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                most = config.optim.clip_norm or float("inf")
                norm = torch.as_tensor(accelerator.clip_grad_norm_(model.parameters(), most))
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                epoch_ends = stream.consumed == 0

                if step % config.log_every == 0 or step == total:
                    position = epoch * len(split) + (stream.consumed or len(split))
                    measured = interval.report(step)
                    tracker.log_train(
                        step=step, epoch=epoch, samples=position, lr=lr, grad_norm=norm.item(), **measured
                    )
                if _due(step, config.eval_every, epoch_ends, total):
                    summary = score(model, validation, accelerator, micro_size=min(16, plan.micro_size))
                    tracker.log_evaluation(step=step, split="val", **summary.scores())
                    if summary.mean_dice > best:
                        best = summary.mean_dice
                        save_best(run, bare, model_card(config, shards, step, best))
                stopping = stop.agreed() and step < total
                if stopping or _due(step, config.checkpoint_every, epoch_ends, total):
                    save(run, step, bare, optimizer, {"best": best, "stream": stream.state_dict()}, keep=config.keep)
                if stopping:
                    raise _stopped(run, step, tracker, accelerator)
                if step == total:
                    break
    accelerator.end_training()
    return summary


def _stopped(run: Path, step: int, tracker: Tracker, accelerator: Accelerator) -> StoppedError:
    """Leave RUN/REQUEUE, and wait for all ranks: the launcher ends the others as soon as one has ended."""
    accelerator.on_main_process((run / REQUEUE_NAME).touch)()
    tracker.close("stopped")
    accelerator.wait_for_everyone()
    return StoppedError(f"stopped by a signal after step {step}; start the same command again to go on")


def _due(step: int, every: int, epoch_ends: bool, total: int) -> bool:
    return step == total or (step % every == 0 if every else epoch_ends)


def plan_batches(config: TrainConfig, world_size: int) -> BatchPlan:
    """How the global batch is cut for `world_size` processes."""
    share = -(-config.batch.global_size // world_size)
    micro = share if config.batch.micro_size == "auto" else min(config.batch.micro_size, share)
    return BatchPlan(global_size=config.batch.global_size, micro_size=micro, world_size=world_size)


def build_model(config: TrainConfig) -> ImprovedUNet:
    """The network with the weights that `config.seed` gives it; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return ImprovedUNet(**dataclasses.asdict(config.model))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for the optimizer: L2 holds for the weights of convolutions, not for biases and norms."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": weights, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def model_card(config: TrainConfig, shards: ShardSet, step: int, best: float) -> dict[str, Any]:
    """What RUN/best says beside the weights: all that a prediction needs."""
    return {
        "architecture": dataclasses.asdict(config.model),
        "size": shards.size,
        "fit": shards.index["built"]["fit"],
        "mean": MEAN,
        "std": STD,
        "threshold": 0.5,
        "score": {"split": "val", "mean_dice": best},
        "step": step,
        "data_digest": shards.digest,
    }


class Interval:
    """What is measured between two lines of the log; on the device, without waiting for it."""

    def __init__(self, accelerator: Accelerator, step: int) -> None:
        """`step`: the steps that are behind the run already."""
        self._accelerator = accelerator
        self._reset(step)

    def waiting(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """`batches`, with the time spent waiting for each."""
        source = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(source, None)
            self._waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def add(self, logits: Tensor, masks: Tensor, valid: Tensor, loss: Tensor, batch: Batch) -> None:
        """One micro batch: logits and masks (B, 1, H, W), valid (B,), and its part of the step's loss."""
        counts = count(logits.detach() > 0, masks > 0) * valid[:, None]
        self._counts += counts.sum(0)
        self._loss += loss
        self._images += batch.step_samples if batch.last else 0

    def report(self, step: int) -> dict[str, float]:
        """The measures over all ranks since the last report: one all-reduce of the counts and one of the loss.

        Raises TrainingError on every rank when the loss is not finite.
        """
        loss = float(torch.as_tensor(self._accelerator.reduce(self._loss, "sum"))) / max(1, step - self._step)
        if not torch.isfinite(torch.tensor(loss)):
            raise TrainingError(
                f"the loss is {loss} between steps {self._step + 1} and {step}; lower --optim.lr, or train with "
                "--mixed_precision bf16 or no; the last checkpoint stands"
            )
        seconds = time.perf_counter() - self._since
        measured = {
            "loss": loss,
            "pooled_dice": pooled_dice(self._counts, self._accelerator),
            "images_per_s": self._images / seconds,
            "data_wait": self._waited / seconds,
        }
        self._reset(step)
        return measured

    def _reset(self, step: int) -> None:
        device = self._accelerator.device
        self._step = step
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)
        self._loss = torch.zeros((), dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)
        self._images, self._waited, self._since = 0, 0.0, time.perf_counter()


def check_set(split: Split, world_size: int) -> None:
    """Raises UsageError when a split cannot be trained on by so many processes."""
    if world_size > len(split):
        raise UsageError(f"{world_size} processes for {len(split)} training samples; start at most {len(split)}")
    if split.size is not None and split.size % STRIDE:
        raise UsageError(
            f"{split.root}: images of {split.size} pixels, but the network needs multiples of {STRIDE}; "
            f"build with --size {max(STRIDE, split.size // STRIDE * STRIDE)}"
        )


def _restore(
    config: TrainConfig, run: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> checkpoint.Checkpoint | None:
    damaged: list[str] = []
    found = checkpoint.newest(run, damaged.append)
    for line in damaged:
        print(f"warning: {line}")
    if found is None:
        return None
    if config.resume == "never":
        raise UsageError(f"{run}: has checkpoints already; choose another --run, or --resume auto to go on")
    try:
        model.load_state_dict(found.weights)
        optimizer.load_state_dict(found.optimizer)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{found.path}: of another network; train in a new run folder") from error
    return found


def _record(config: TrainConfig, shards: ShardSet, accelerator: Accelerator) -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in ("isicdist", "torch", "accelerate", "webdataset")}
    return {
        **config.to_json(),
        "data_digest": shards.digest,
        "world_size": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "versions": {"python": platform.python_version(), **versions},
    }
