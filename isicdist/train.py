"""Training: set-up, then one loop that reads from top to bottom.

All that is distributed about it is arithmetic in `isicdist.data.order` (who reads what), one vote per step on whether
to stop or to make micro batches smaller, and one sum (`isicdist.distributed.gradients`). With the global batch fixed,
the loop does the same on any number of processes.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast

from isicdist.config import TrainConfig
from isicdist.data.augment import augment
from isicdist.data.decoded_cache import DecodedCache
from isicdist.data.order import BatchPlan, Purpose, epoch_order, random_keys
from isicdist.data.stream import Batch, Stream
from isicdist.distributed import launch
from isicdist.distributed.agree import AnyRank, StopSignal, raise_on_lost_rank
from isicdist.distributed.gradients import Gradients
from isicdist.errors import StoppedError
from isicdist.evaluate import validate
from isicdist.metrics.dice import DiceSummary
from isicdist.network.best import save_best as save_best_model
from isicdist.network.loss import segmentation_loss
from isicdist.network.normalise import MEAN, STD, normalise, to_unit
from isicdist.network.unet import SIZE_DIVISOR, ImprovedUNet
from isicdist.training import checkpoint
from isicdist.training import state as resume
from isicdist.training.meter import TrainMeter
from isicdist.training.micro_batch import OomGuard, initial_micro_size
from isicdist.training.nonfinite import NonFiniteGuard
from isicdist.training.optim import EarlyStopping, Ema, learning_rate, parameter_groups
from isicdist.training.tracking import Tracker
from shards.errors import UsageError
from shards.reader import ShardSet, Split
from shards.remote.cache import NodeCache

if TYPE_CHECKING:
    from accelerate import Accelerator

REQUEUE_NAME = "REQUEUE"
"""In the run's folder while a run that a signal stopped waits to be started again."""


@raise_on_lost_rank()
def train(config: TrainConfig, data: str, run: Path) -> DiceSummary | None:
    """Train on `data` into `run`; returns the last evaluation of the validation split.

    Every process that `accelerate launch` started calls it. Raises the errors of `shards.errors`.
    """
    accelerator = launch.start(config.timeout)
    shards = ShardSet.open(data, NodeCache(limit=config.stream.cache_size))
    split, validation = shards.split("train"), shards.split("val")
    check_set(split, accelerator.num_processes)
    plan = plan_batches(config, accelerator.num_processes, split.size or 0, accelerator.device)
    record = _record(config, shards, accelerator)
    bare = build_model(config)  # the weights, without what autocast wraps around them
    ema = Ema(bare, config.optim.ema_decay)
    adam = torch.optim.Adam(parameter_groups(bare, config.optim.weight_decay), lr=config.optim.lr, fused=True)
    start = resume.find(run, record, accelerator)
    if start:
        resume.restore(start, bare, ema.model, adam)
    # Evaluation mode means no more than: without DDP. `Gradients` sums.
    model, judged = (accelerator.prepare_model(network, evaluation_mode=True) for network in (bare, ema.model))
    broadcast([weight.data for network in (bare, ema.model) for weight in network.parameters()])
    optimizer = accelerator.prepare_optimizer(adam)
    gradients = Gradients(bare.parameters(), accelerator)
    save, save_best = (accelerator.on_main_process(write) for write in (checkpoint.save, save_best_model))

    kept, kept_validation = (DecodedCache.open(config.stream.decoded_cache, each) for each in (split, validation))
    stream = Stream(
        split,
        plan,
        accelerator.process_index,
        seed=config.seed,
        window=config.stream.window or split.window,
        workers=config.stream.workers,
        prefetch=config.stream.prefetch,
        device=accelerator.device,
        decoded=kept,
    )
    scaler, step, selection = accelerator.scaler, 0, EarlyStopping(patience=config.patience)
    if start:
        stream.load_state_dict(start.state["stream"])
        step, selection.best, selection.since = (start.state[name] for name in ("step", "best", "since_best"))
        if scaler and start.state["scaler"]:
            scaler.load_state_dict(start.state["scaler"])
    position = stream.state_dict()
    per_epoch = stream.steps_per_epoch
    total = min(config.epochs * per_epoch, config.steps or config.epochs * per_epoch)
    memory, vote = OomGuard(), AnyRank(accelerator, config.timeout)
    guard = NonFiniteGuard(
        adam, limit=config.max_nonfinite_steps, scaled=scaler is not None, keys_at=partial(sample_names_of_step, stream)
    )
    summary, main = None, accelerator.is_main_process

    def learn(batch: Batch, epoch: int) -> None:
        """Forward and backward of one micro batch. What it made goes when it ends, also when memory has run out."""
        images, masks = to_unit(batch.images), batch.masks
        if config.augment.enabled:
            keys = random_keys(config.seed, epoch, batch.indices, Purpose.AUGMENT)
            side = training_side(images.shape[-1], small=step < config.augment.progressive_resize_fraction * total)
            images, masks = augment(images, masks, keys, config.augment, side)
        keys = torch.from_numpy(random_keys(config.seed, step, batch.indices, Purpose.DROPOUT))
        valid = torch.from_numpy(batch.valid).to(accelerator.device, non_blocking=True)
        logits = model(normalise(images), keys.to(accelerator.device, non_blocking=True))
        losses = segmentation_loss(logits, masks, config.optim.bce_weight)  # (B,)
        loss = (losses * valid).sum() / batch.step_samples  # summed over micro batches and ranks: the step's mean
        accelerator.backward(loss)
        gradients.add_loss(loss)
        interval.add(logits, masks, valid)

    def judge() -> bool:
        """Evaluate, and keep the best; returns whether it came to its end: a signal leaves it to the run after this."""
        nonlocal summary
        told, size = (lambda: vote(stop.told)[0]), min(16, plan.micro_size)
        try:
            summary, threshold = validate(
                judged, validation, accelerator, micro_size=size, decoded=kept_validation, stop=told
            )
        except StoppedError:
            return False
        tracker.log_evaluation(step=step, split="val", **summary.scores())
        if selection.better(summary.mean_dice):
            save_best(run, ema.model, model_metadata(config, shards, step, selection.best, threshold))
        return True

    with stream, StopSignal() as stop, Tracker.open(run, record, main=main, total_steps=total) as tracker:
        tracker.truncate_after(step)
        accelerator.on_main_process((run / REQUEUE_NAME).unlink)(missing_ok=True)
        if start:
            tracker.note(f"resumed from {start.path.name}, step {step} of {total}")
            if start.state["unjudged"] and not judge():
                raise _stopped(run, step, tracker, accelerator)
        interval = TrainMeter(accelerator)
        while step < total and not selection.over:
            epoch = stream.epoch_number
            for batch in interval.waiting(stream.epoch()):
                with memory:
                    learn(batch, epoch)
                if not batch.last:
                    continue

                stopping, exhausted = vote(stop.told, memory.exhausted)
                if exhausted:  # this step again, in smaller micro batches
                    stream.plan = plan = memory.cut(plan, config.batch.micro_size)
                    stream.load_state_dict(position)
                    gradients.zero()
                    interval = TrainMeter(accelerator)
                    tracker.note(f"out of memory in step {step + 1}: now {plan.micro_size} samples at once")
                    break

                lr = learning_rate(config.optim.schedule, config.optim.lr, step, total, per_epoch)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                loss = gradients.reduce()
                most = config.optim.clip_norm or float("inf")
                norm = torch.as_tensor(accelerator.clip_grad_norm_(bare.parameters(), most))
                bad = guard.judge(step + 1, position, loss, norm)
                optimizer.step()
                gradients.zero()
                step += 1
                ema.update(bare, step)
                interval.add_step(loss, bad, batch.step_samples)
                epoch_ends, position = stream.consumed == 0, stream.state_dict()

                if step % config.log_every == 0 or step == total:
                    samples = epoch * len(split) + (stream.consumed or len(split))
                    measured = interval.report()
                    tracker.log_train(step=step, epoch=epoch, samples=samples, lr=lr, grad_norm=norm.item(), **measured)
                unjudged = _due(step, config.eval_every, epoch_ends, total) and not judge()
                done = (step == total or selection.over) and not unjudged
                if stopping or unjudged or done or _due(step, config.checkpoint_every, epoch_ends, total):
                    state = {"best": selection.best, "since_best": selection.since, "unjudged": unjudged}
                    state |= {"stream": position, "scaler": scaler and scaler.state_dict(), "config": record}
                    save(run, step, bare, ema.model, optimizer, state, keep=config.keep)
                if done:
                    break
                if stopping or unjudged:
                    raise _stopped(run, step, tracker, accelerator)
        if selection.over:
            tracker.note(f"no better score in {selection.since} evaluations: ended at step {step}")
    accelerator.end_training()
    return summary


def _stopped(run: Path, step: int, tracker: Tracker, accelerator: Accelerator) -> StoppedError:
    """Leave RUN/REQUEUE, and wait for all ranks: the launcher ends the others as soon as one has ended."""
    accelerator.on_main_process((run / REQUEUE_NAME).touch)()
    tracker.close("stopped")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return StoppedError(f"stopped by a signal after step {step}; start the same command again to go on")


def _due(step: int, every: int, epoch_ends: bool, total: int) -> bool:
    return step == total or (step % every == 0 if every else epoch_ends)


def plan_batches(config: TrainConfig, world_size: int, side: int, device: torch.device) -> BatchPlan:
    """How the global batch is cut for `world_size` processes; `side`: of the square images, in pixels."""
    share = -(-config.batch.global_size // world_size)
    asked = config.batch.micro_size
    micro = initial_micro_size(share, side, device) if asked == "auto" else min(asked, share)
    return BatchPlan(global_size=config.batch.global_size, micro_size=micro, world_size=world_size)


def training_side(side: int, *, small: bool) -> int:
    """At which side images of `side` pixels are trained on: theirs, or about three quarters of it."""
    return max(SIZE_DIVISOR, side * 3 // 4 // SIZE_DIVISOR * SIZE_DIVISOR) if small else side


def sample_names_of_step(stream: Stream, position: dict[str, int]) -> list[str]:
    """The keys of the samples of the whole step that begins at `position`, a state of the stream."""
    order = epoch_order(stream.split, stream.seed, position["epoch"], stream.window)
    return [stream.split.key(number) for number in order[position["consumed"] :][: stream.plan.global_size]]


def build_model(config: TrainConfig) -> ImprovedUNet:
    """The network with the weights that `config.seed` gives it; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return ImprovedUNet(**dataclasses.asdict(config.model))


def model_metadata(
    config: TrainConfig, shards: ShardSet, step: int, best: float, threshold: float = 0.5
) -> dict[str, Any]:
    """What RUN/best says beside the weights: all that a prediction needs.

    `best`: the mean Dice of the validation split at 0.5. `threshold`: of its highest pooled Dice.
    """
    return {
        "architecture": dataclasses.asdict(config.model),
        "size": shards.size,
        "fit": shards.index["built"]["fit"],
        "mean": MEAN,
        "std": STD,
        "threshold": threshold,
        "score": {"split": "val", "threshold": 0.5, "mean_dice": best},
        "step": step,
        "data_digest": shards.digest,
    }


def check_set(split: Split, world_size: int) -> None:
    """Raises UsageError when a split cannot be trained on by so many processes."""
    if world_size > len(split):
        raise UsageError(f"{world_size} processes for {len(split)} training samples; start at most {len(split)}")
    if split.size is not None and split.size % SIZE_DIVISOR:
        raise UsageError(
            f"{split.location}: images of {split.size} pixels, but the network needs multiples of {SIZE_DIVISOR}; "
            f"build with --size {max(SIZE_DIVISOR, split.size // SIZE_DIVISOR * SIZE_DIVISOR)}"
        )


def _record(config: TrainConfig, shards: ShardSet, accelerator: Accelerator) -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in ("isicdist", "torch", "accelerate", "webdataset")}
    return {
        **config.to_json(),
        "data_digest": shards.digest,
        "world_size": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "versions": {"python": platform.python_version(), **versions},
    }
