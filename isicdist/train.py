"""Training: `Trainer.run` is the loop, which reads from top to bottom; the other methods are its steps.

All that is distributed about it is arithmetic in `isicdist.data.order` (which rank reads which sample), one vote per
step on whether to stop or to make micro batches smaller, and one all-reduce of the gradients. With the global batch
fixed, the loop does the same on any number of processes.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast

from isicdist.config import Fold, TrainConfig
from isicdist.data.augment import augment
from isicdist.data.decoded_cache import DecodedCache
from isicdist.data.folds import training_splits
from isicdist.data.order import Purpose, random_keys
from isicdist.data.stream import Batch, Step, Stream
from isicdist.data.upload import upload
from isicdist.distributed import launch
from isicdist.distributed.agree import AnyRank, StopSignal, raise_on_lost_rank
from isicdist.distributed.compare_ranks import compare_ranks
from isicdist.distributed.gradients import Gradients
from isicdist.errors import StoppedError
from isicdist.metrics.dice import DiceSummary, per_image_scores
from isicdist.metrics.examples import select_training_examples
from isicdist.metrics.thresholds import ThresholdCurve
from isicdist.network.best import ModelMetadata, ValidationScore, save_best
from isicdist.network.cpu_precision import faster_cpu_precision
from isicdist.network.loss import segmentation_loss
from isicdist.network.normalise import normalise, to_unit
from isicdist.network.seen import SeenImages
from isicdist.network.unet import ImprovedUNet
from isicdist.run_folder import REQUEUE_NAME
from isicdist.training import checkpoint
from isicdist.training.checkpoint import BackgroundWriter, Snapshot
from isicdist.training.meter import TrainMeter
from isicdist.training.micro_batch import OomGuard, check_split, evaluation_micro_size, plan_batches, training_side
from isicdist.training.nonfinite import NonFiniteGuard
from isicdist.training.optim import EarlyStopping, Ema, learning_rate, parameter_groups
from isicdist.training.scoring import predict_probs, validate
from isicdist.training.state import RunLock, RunRecord, TrainState, find_checkpoint, restore_weights
from isicdist.training.tracking import EvaluationDetails, EvaluationMetrics, Tracker, TrainMetrics
from shards.mask_statistics import mask_warnings, without_lesion
from shards.reader import ShardSet
from shards.remote.cache import NodeCache


@raise_on_lost_rank()
def train(config: TrainConfig, data: str, run: Path) -> DiceSummary | None:
    """Train on the shard set `data` into the folder `run`; returns the last evaluation of the validation split.

    Every process that `accelerate launch` started calls it. Raises the errors of `shards.errors`; StoppedError after a
    signal, when the checkpoint is saved.
    """
    return Trainer(config, data, run).run()


class Trainer:
    """One training run on this process: the same objects and the same steps on every rank."""

    def __init__(self, config: TrainConfig, data: str, run: Path) -> None:
        """Open the data, build or restore the model, and start no step yet. Every rank does."""
        self.config, self.run_folder = config, run
        self.accelerator = launch.start(config.timeout, probe_cpu=faster_cpu_precision)

        # Data: which samples there are, and how a global batch is cut for this many processes.
        with compare_ranks(self.accelerator) as facts:
            self.shards = ShardSet.open(data, NodeCache(max_bytes=config.stream.cache_size))
            self.record = RunRecord.of(config, self.shards.digest, self.accelerator)
            facts.update(self.record.common_settings())
        fold = Fold.parse(config.fold) if config.fold else None
        self.train_split, self.val_split = training_splits(self.shards, fold)
        world_size = self.accelerator.num_processes
        side = check_split(self.train_split, world_size)
        plan = plan_batches(config.batch, world_size, side, self.accelerator.device)

        # Model, EMA and optimizer, with the weights of the newest checkpoint if there is one.
        self.model = build_model(config)
        self.ema = Ema(self.model, config.optim.ema_decay)
        groups = parameter_groups(self.model, config.optim.weight_decay)
        adam = torch.optim.Adam(groups, lr=config.optim.lr, fused=True)
        self.lock = RunLock(run)
        found = find_checkpoint(run, self.record, self.accelerator, self.lock)
        if found:
            restore_weights(found, self.model, self.ema.model, adam)
        self._prepare(adam)

        # The stream of batches, and the state that a run continues from.
        self.workers = launch.decoding_threads(config.stream.workers, self.accelerator.device)
        train_cache, self.val_cache = (
            DecodedCache.open(config.stream.decoded_cache, split) for split in (self.train_split, self.val_split)
        )
        self.stream = Stream(
            self.train_split,
            plan,
            self.accelerator.process_index,
            seed=config.seed,
            window=config.stream.window or (found.state["stream"]["window"] if found else self.train_split.window),
            workers=self.workers,
            prefetch=config.stream.prefetch,
            device=self.accelerator.device,
            decoded=train_cache,
        )
        self.resumed_from = found.path.name if found else None
        if found:
            self.state = TrainState.from_json(found.state, patience=config.patience)
            self.stream.load_state_dict(self.state.stream)
            if self.scaler and self.state.scaler:
                self.scaler.load_state_dict(self.state.scaler)
        else:
            self.state = TrainState(
                stream=self.stream.state_dict(), early_stopping=EarlyStopping(patience=config.patience)
            )
        steps_of_epochs = self.state.step + self.stream.steps_left(config.epochs)  # its batch may have been another
        self.total_steps = min(steps_of_epochs, config.steps or steps_of_epochs)

        # What watches over a step.
        self.oom_guard, self.stop_signal = OomGuard(), StopSignal()
        self.evaluation_micro_size = evaluation_micro_size(config.batch.micro_size, side, self.accelerator.device)
        self.any_rank = AnyRank(self.accelerator, config.timeout)
        self.nonfinite_guard = NonFiniteGuard(
            adam,
            limit=config.max_nonfinite_steps,
            scaled=self.scaler is not None,
            sample_names=self.stream.step_sample_names,
        )
        self.meter = TrainMeter(self.accelerator)
        self.writer, self.last_checkpoint = BackgroundWriter(), time.monotonic()
        self.last_summary: DiceSummary | None = None
        self.first_step_since = 0.0
        """Time at which the first step of `run` began; 0 before and after it."""

    def run(self) -> DiceSummary | None:
        """Train to the end; returns the last evaluation. Raises StoppedError after a signal, with a checkpoint."""
        state, config = self.state, self.config
        with self.lock, self.stream, self.stop_signal, self._open_tracker() as self.tracker, self.writer:
            self._resume()
            self.meter.reset()
            self.first_step_since = time.perf_counter()
            while not self.finished:
                for step in self.stream.steps():  # the optimizer steps of one epoch
                    # 1. Gradient accumulation over this rank's micro batches. Out of memory is noted here ...
                    for batch in self.meter.timed(step):
                        with self.oom_guard:
                            self.forward_backward(batch)

                    # 2. ... and all ranks agree on what to do about it before they exchange anything.
                    stop_requested, out_of_memory = self.any_rank(self.stop_signal.received, self.oom_guard.tripped)
                    if out_of_memory:
                        self.repeat_in_smaller_micro_batches(step)
                        break

                    # 3. Sum over the ranks, clip, skip a non-finite update, step, average the weights.
                    learning_rate, grad_norm = self.optimizer_step(step)

                    # 4. Log, evaluate, save. A signal ends the run after the checkpoint.
                    if state.step % config.log_every == 0 or state.step == self.total_steps:
                        self.log(step, learning_rate, grad_norm)
                    if self.is_due(config.eval_every):
                        with self.meter.paused():
                            state.eval_pending = not self.evaluate()
                    stopping = stop_requested or state.eval_pending
                    if stopping or self.finished or self.is_due(config.checkpoint_every):
                        self.save_checkpoint(required=stopping or self.finished)
                    if self.finished:
                        break
                    if stopping:
                        raise self.stopped()
            if state.early_stopping.reached:
                evaluations = state.early_stopping.evals_since_best
                self.tracker.note(f"no better score in {evaluations} evaluations: ended at step {state.step}")
        self.accelerator.end_training()
        return self.last_summary

    def forward_backward(self, batch: Batch) -> None:
        """Add the gradient of one micro batch. Activations are local: they are freed on return, also after OOM."""
        config, state = self.config, self.state
        images, masks = to_unit(batch.images), batch.masks  # (B, 3, H, W), (B, 1, H, W)
        if config.augment.enabled:
            keys = random_keys(config.seed, self.stream.epoch_number, batch.indices, Purpose.AUGMENT)
            small = state.step < config.augment.progressive_resize_fraction * self.total_steps
            images, masks = augment(images, masks, keys, config.augment, training_side(images.shape[-1], small=small))
        keys = upload(random_keys(config.seed, state.step, batch.indices, Purpose.DROPOUT), batch.images.device)
        logits = self.prepared_model(normalise(images), keys)
        losses = segmentation_loss(logits, masks, config.optim.bce_weight)  # (B,)
        loss = (losses * batch.valid).sum() / batch.step_samples  # summed over micro batches and ranks: the step's mean
        self.accelerator.backward(loss)
        self.gradients.add_micro_batch(loss)
        self.meter.add_micro_batch(logits, masks, batch.valid)

    def optimizer_step(self, step: Step) -> tuple[float, torch.Tensor]:
        """Update the weights by the gradients of all ranks; returns the learning rate and the gradient's norm."""
        optim, state = self.config.optim, self.state
        rate = learning_rate(optim.schedule, optim.lr, state.step, self.total_steps, step.start["epoch"])
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.gradients.all_reduce()
        norm = self.gradients.clip(optim.clip_norm, self.optimizer)
        skipped = self.nonfinite_guard.check(state.step + 1, step.start, loss, norm)
        self.optimizer.step()
        self.gradients.zero()
        state.step += 1
        self.ema.update(state.step)
        self.meter.add_step(loss, skipped, step.samples)
        if self.first_step_since:  # of this start: it has compiled kernels, warmed up cuDNN, filled the stream
            self.tracker.note(f"first step: {time.perf_counter() - self.first_step_since:.1f} s")
            self.first_step_since = 0.0
        return rate, norm

    def repeat_in_smaller_micro_batches(self, step: Step) -> None:
        """Halve the micro batches after an out-of-memory error, and go back to the start of the step."""
        plan = self.oom_guard.halve_micro_batch(self.stream.plan, self.config.batch.micro_size)
        self.stream.plan = plan
        self.evaluation_micro_size = min(self.evaluation_micro_size, plan.micro_size)
        self.stream.load_state_dict(step.start)
        self.gradients.zero()
        self.meter.reset()
        self.tracker.note(f"out of memory in step {self.state.step + 1}: now {plan.micro_size} samples at once")

    def evaluate(self) -> bool:
        """Evaluate on `val`, save RUN/best if it improved. False if a signal interrupted: the next run repeats it."""
        try:
            summary, curve = validate(
                self.prepared_ema,
                self.val_split,
                self.accelerator,
                micro_size=self.evaluation_micro_size,
                workers=self.workers,
                decoded=self.val_cache,
                progress=lambda done: self.tracker.log_progress("val", done, len(self.val_split)),
                stop=lambda: self.any_rank(self.stop_signal.received)[0],
            )
        except StoppedError:
            return False
        self.last_summary = summary
        if without_lesion(self.val_split):
            self.tracker.note("the masks of val are all empty: its Dice is no score")
        self.tracker.log_evaluation(
            EvaluationMetrics(step=self.state.step, split="val", **summary.scores()),
            functools.partial(self._evaluation_details, summary, curve),
        )
        if self.state.early_stopping.update(summary.mean_dice):
            metadata = ModelMetadata.of(
                self.config.model,
                self.shards,
                step=self.state.step,
                score=ValidationScore(split=self.val_split.name, mean_dice=summary.mean_dice),
                threshold=curve.tuned_threshold,
            )
            seen = SeenImages.of(self.train_split, self.val_split)
            self.accelerator.on_main_process(save_best)(self.run_folder, self.ema.model, metadata, seen)
        return True

    def _evaluation_details(self, summary: DiceSummary, curve: ThresholdCurve) -> EvaluationDetails:
        """Predict examples on the main process, for dashboards."""
        examples = select_training_examples(
            functools.partial(predict_probs, self.prepared_ema),
            self.val_split,
            summary,
            self.accelerator.device,
            micro_size=self.evaluation_micro_size,
        )
        epoch, consumed = self.stream.epoch_number, self.stream.consumed
        return EvaluationDetails(
            epoch=epoch,
            samples=epoch * len(self.train_split) + consumed,
            scores=dataclasses.asdict(curve.summary()),
            dice=per_image_scores(summary.rows)[0],
            curve=curve,
            examples=examples,
        )

    def log(self, step: Step, learning_rate: float, grad_norm: torch.Tensor) -> None:
        """Write one line of the log; the only place of a step that waits for the device."""
        epoch = step.start["epoch"]
        metrics = TrainMetrics(
            step=self.state.step,
            epoch=epoch,
            samples=epoch * len(self.train_split) + step.start["consumed"] + step.samples,
            lr=learning_rate,
            grad_norm=grad_norm.item(),
            loss_scale=self.scaler.get_scale() if self.scaler else None,
            **dataclasses.asdict(self.meter.compute()),
        )
        self.tracker.log_train(metrics)

    def save_checkpoint(self, *, required: bool) -> None:
        """Publish a checkpoint of this step: a copy, which the main process writes while training goes on.

        One that is not `required` is left out where the last one is less than `checkpoint_min_seconds` old.
        """
        if not required and time.monotonic() - self.last_checkpoint < self.config.checkpoint_min_seconds:
            return
        self.last_checkpoint = time.monotonic()
        self.state.stream = self.stream.state_dict()
        self.state.scaler = self.scaler.state_dict() if self.scaler else None
        self.state.config = self.record.to_json()
        self.accelerator.on_main_process(self._write_checkpoint)()

    def stopped(self) -> StoppedError:
        """Leave RUN/REQUEUE, and wait for all ranks: the launcher ends the others as soon as one has ended."""
        self.writer.wait()
        self.accelerator.on_main_process((self.run_folder / REQUEUE_NAME).touch)()
        self.tracker.close("stopped")
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return StoppedError(f"stopped by a signal after step {self.state.step}; start the same command again to go on")

    @property
    def finished(self) -> bool:
        """All steps are made, or early stopping ends the run; not before a pending evaluation."""
        ended = self.state.step >= self.total_steps or self.state.early_stopping.reached
        return ended and not self.state.eval_pending

    def is_due(self, every: int) -> bool:
        """Give True for a step after which something happens `every` so many steps (0: after each epoch) and last."""
        epoch_ends = self.stream.consumed == 0
        return self.state.step == self.total_steps or (self.state.step % every == 0 if every else epoch_ends)

    def _prepare(self, adam: torch.optim.Adam) -> None:
        """Move everything to the device; from here on all ranks have the same weights."""
        # evaluation_mode=True only keeps accelerate from wrapping in DDP; `Gradients` does the all-reduce.
        self.prepared_model, self.prepared_ema = (
            self.accelerator.prepare_model(network, evaluation_mode=True) for network in (self.model, self.ema.model)
        )
        compiled, self.compile_note = launch.decide_compile(self.config.compile, self.accelerator.device)
        if compiled:
            for network in (self.prepared_model, self.prepared_ema):
                network.compile(dynamic=False)  # in place: weights and checkpoints keep their names
        broadcast([weight.data for network in (self.model, self.ema.model) for weight in network.parameters()])
        self.optimizer = self.accelerator.prepare_optimizer(adam)
        self.gradients = Gradients(self.model.parameters(), self.accelerator)
        self.scaler = self.accelerator.scaler

    def _write_checkpoint(self) -> None:
        snapshot = Snapshot.of(self.model, self.ema.model, self.optimizer)
        self.writer.submit(self._save, snapshot, self.state.to_json())

    def _save(self, snapshot: Snapshot, state: dict[str, Any]) -> None:
        """Write a checkpoint, on the writer's thread."""
        checkpoint.save(self.run_folder, snapshot, state, keep=self.config.keep)
        self.tracker.log_checkpoint(state["step"])

    def _open_tracker(self) -> Tracker:
        main = self.accelerator.is_main_process
        record = {**self.record.to_json(), "dataset": self.shards.describe()}
        return Tracker.open(self.run_folder, record, main=main, total_steps=self.total_steps)

    def _resume(self) -> None:
        """Resume where the checkpoint stands: the log, and an evaluation that a signal interrupted; or begin."""
        self.tracker.truncate_after(self.state.step, evaluated=not self.state.eval_pending)
        self.accelerator.on_main_process((self.run_folder / REQUEUE_NAME).unlink)(missing_ok=True)
        if self.accelerator.device.type != "cpu":
            self.tracker.note(self.compile_note)
        for split in (self.train_split, self.val_split):
            for line in mask_warnings(split):
                self.tracker.note(f"warning: {line}")
        if self.resumed_from:
            self.tracker.note(f"resumed from {self.resumed_from}, step {self.state.step} of {self.total_steps}")
        if self.state.step >= self.total_steps:
            self.tracker.note("nothing is left to train; more --epochs or --steps would go on")
        if self.state.eval_pending and not self.evaluate():
            raise self.stopped()
        self.state.eval_pending = False


def build_model(config: TrainConfig) -> ImprovedUNet:
    """Build the network with the initial weights of `config.seed`; the global generator is not consumed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return ImprovedUNet(**dataclasses.asdict(config.model))
