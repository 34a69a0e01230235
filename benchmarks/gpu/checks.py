"""Checks that the device computes what the CPU computes.

    python -m benchmarks.gpu.checks --data SET --names NAME ...

Each is a function of the shard set that returns the detail of its row and raises AssertionError. tests/gpu runs them
under pytest.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import io
import json
import math
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import isicdist.train
from benchmarks.gpu.bare import BareStep
from benchmarks.gpu.rows import Outcome, emit_rows
from benchmarks.train_step import channels_last
from isicdist.config import AugmentConfig, BatchConfig, ModelConfig, OptimConfig, TrainConfig
from isicdist.data.augment import augment
from isicdist.data.order import BatchPlan
from isicdist.data.stream import Batch, Step, Stream
from isicdist.distributed import launch
from isicdist.metrics.dice import count
from isicdist.metrics.thresholds import ThresholdReduction
from isicdist.network.dropout import keyed_keep
from isicdist.network.loss import segmentation_loss
from isicdist.network.normalise import to_unit
from isicdist.network.unet import ContextModule, ConvBeforeNorm, ImprovedUNet, UpSampling
from isicdist.settings_file import load_recipe
from isicdist.train import Trainer
from shards.reader import ShardSet

LAYOUTS = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}
COMPILED_LIMITS = (1e-4, 1e-1)
"""Largest relative errors of logits and gradient of the compiled network, compared with eager, in float32."""
WATCHED_STEPS = range(11, 21)
"""Steps (from 1) of a run in which no wait is allowed."""


def device() -> torch.device:
    """Give the device under test: the first GPU, or the CPU where there is none."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def relative_error(values: Tensor, reference: Tensor) -> float:
    """Give the norm of the difference over the norm of the reference."""
    values, reference = values.double().cpu(), reference.double().cpu()
    return float((values - reference).norm() / reference.norm())


def dropout_mask(data: Path) -> str:
    """Compare the keep masks of keyed dropout bit by bit, in both memory layouts."""
    keys = torch.from_numpy(np.random.default_rng(0).integers(0, 2**62, 5))
    elements = 0
    for shape in ((16, 64, 64), (256, 4, 4), (3, 5, 7)):
        for layout in (torch.contiguous_format, torch.channels_last):
            sample = torch.zeros((2, *shape)).contiguous(memory_format=layout)
            expected = keyed_keep(keys, 3, sample[0], 0.3)
            found = keyed_keep(keys.to(device()), 3, sample.to(device())[0], 0.3)
            assert torch.equal(found.cpu(), expected), f"masks of {shape}, {layout} differ"
            elements += expected.numel()
    return f"{elements} elements are the same"


def augmentation(data: Path) -> str:
    """Compare augmented images and masks pixel by pixel, by the paper's settings and a recipe's."""
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (8, 96, 96, 3), dtype=np.uint8)).permute(0, 3, 1, 2)
    masks = torch.from_numpy((rng.random((8, 1, 96, 96)) > 0.5).astype(np.uint8))
    keys, worst = rng.integers(0, 2**62, 8), 0.0
    for config in (AugmentConfig(), AugmentConfig(**load_recipe("isic2018-128")["augment"])):
        for side in (96, 64):
            expected, expected_masks = augment(to_unit(images), masks, keys, config, side)
            found, found_masks = augment(to_unit(images.to(device())), masks.to(device()), keys, config, side)
            # The images are noise: where a source lies on the edge of two pixels, rounding decides.
            different = ((found.cpu() - expected).abs() > 1e-2).float().mean().item()
            wrong = (found_masks.cpu() != expected_masks).float().mean().item()
            worst = max(worst, different, wrong)
    assert worst < 1e-3, f"{100 * worst:.2f} % of the pixels differ"
    return f"at most {100 * worst:.4f} % of the pixels differ"


def network_and_gradient(data: Path) -> str:
    """Compare logits and gradient in each precision, and in channels-last, with those of float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((2, 3, 64, 64), generator=generator, dtype=torch.float64)
    masks = (torch.rand((2, 1, 64, 64), generator=generator) > 0.5).to(torch.uint8)
    keys = torch.tensor([5, 6])

    def run(on: torch.device, dtype: torch.dtype, autocast: torch.dtype | None, last: bool) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        network = ImprovedUNet(base_channels=8).to(on, dtype)
        if last:
            channels_last(network)
        with torch.autocast(on.type, autocast or torch.bfloat16, enabled=autocast is not None):
            logits = network(images.to(on, dtype), keys.to(on))
        segmentation_loss(logits, masks.to(on)).mean().backward()
        return logits.detach(), torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])

    reference = run(torch.device("cpu"), torch.float64, None, False)
    # Name, type of the weights, autocast, channels-last, TF32, largest relative error of logits and of gradient.
    cases = [
        ("float64", torch.float64, None, False, False, 1e-10, 1e-6),
        ("float64 channels-last", torch.float64, None, True, False, 1e-10, 1e-6),
        ("float32", torch.float32, None, False, False, 1e-4, 1e-1),
        ("TF32", torch.float32, None, False, True, 2e-2, 1.0),
        ("bf16", torch.float32, torch.bfloat16, False, True, 1e-1, 1.5),
        ("bf16 channels-last", torch.float32, torch.bfloat16, True, True, 1e-1, 1.5),
    ]
    if device().type == "cuda":
        cases.append(("fp16", torch.float32, torch.float16, False, True, 5e-2, 1.0))
    texts, too_far = [], []
    allowed = torch.backends.cudnn.allow_tf32
    for name, dtype, autocast, last, tf32, *limits in cases:
        torch.backends.cudnn.allow_tf32 = tf32
        errors = [relative_error(*pair) for pair in zip(run(device(), dtype, autocast, last), reference, strict=True)]
        texts.append(f"{name} {errors[0]:.1e} and {errors[1]:.1e}")
        too_far += [] if all(error < limit for error, limit in zip(errors, limits, strict=True)) else [name]  # or NaN
    torch.backends.cudnn.allow_tf32 = allowed
    text = f"relative errors of logits and gradient: {', '.join(texts)}"
    assert not too_far, f"too far off in {', '.join(too_far)}; {text}"
    return text


class OneLevel(nn.Module):
    """A network with each kind of layer: the whole one takes a minute and a half to be compiled for a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.context = ContextModule(4, 0.3, level=2)
        self.down = ConvBeforeNorm(4, 8, stride=2)
        self.up = UpSampling(8, lowest=False)
        self.head = nn.Conv2d(8, 1, 1)

    def forward(self, images: Tensor, keys: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 1, H, W)."""
        skip = self.context(self.stem(images), keys)  # (B, 4, H, W)
        return self.head(torch.cat([skip, self.up(self.down(skip))], 1))


def compiled_against_eager(data: Path) -> str:
    """Compare what torch.compile makes with eager: dropout masks bit by bit, logits and gradient of the network."""
    keys = torch.from_numpy(np.random.default_rng(0).integers(0, 2**62, 5)).to(device())
    compiled_keep = torch.compile(keyed_keep, dynamic=False, fullgraph=True)
    elements = 0
    for layout in LAYOUTS.values():
        sample = torch.zeros((2, 16, 32, 32), device=device()).contiguous(memory_format=layout)[0]
        expected, found = keyed_keep(keys, 3, sample, 0.3), compiled_keep(keys, 3, sample, 0.3)
        assert torch.equal(found, expected), f"dropout masks differ in {layout}"
        elements += expected.numel()

    generator = torch.Generator().manual_seed(0)
    images = torch.randn((2, 3, 64, 64), generator=generator).to(device())
    masks = (torch.rand((2, 1, 64, 64), generator=generator) > 0.5).to(device(), torch.uint8)

    def run(network: nn.Module) -> tuple[Tensor, Tensor]:
        logits = network(images, keys[:2])
        segmentation_loss(logits, masks).mean().backward()
        return logits.detach(), torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])

    texts, too_far = [], []
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    for name, layout in LAYOUTS.items():
        outputs = []
        for compiled in (False, True):
            torch.manual_seed(0)
            network = (ImprovedUNet() if device().type == "cuda" else OneLevel()).to(device())
            if layout == torch.channels_last:
                channels_last(network)
            if compiled:
                network.compile(dynamic=False)
            outputs.append(run(network))
        errors = [relative_error(*pair) for pair in zip(outputs[1], outputs[0], strict=True)]
        texts.append(f"{name} {errors[0]:.1e} and {errors[1]:.1e}")
        within = all(error < limit for error, limit in zip(errors, COMPILED_LIMITS, strict=True))
        too_far += [] if within else [name]
    torch.backends.cudnn.allow_tf32 = allowed
    text = f"{elements} elements of dropout masks are the same; float32 logits and gradient: {', '.join(texts)}"
    assert not too_far, f"too far off in {', '.join(too_far)}; {text}"
    return text


def counts(data: Path) -> str:
    """Compare the integers of Dice and of the threshold histogram, NaN included."""
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand((5, 1, 64, 64), generator=generator)
    probs[0, 0, 0, :3] = torch.tensor([0.0, 1.0, math.nan])
    masks = (torch.rand((5, 1, 64, 64), generator=generator) > 0.5).to(torch.uint8)
    ids, valid = torch.arange(5), torch.tensor([True] * 4 + [False])
    expected = count(probs > 0.5, masks > 0)
    found = count(probs.to(device()) > 0.5, masks.to(device()) > 0).cpu()
    assert torch.equal(found, expected), f"TP, FP and FN are {found.tolist()}, on the CPU {expected.tolist()}"
    thresholds = ThresholdReduction(device())
    thresholds.update(probs.to(device()), masks.to(device()), ids.to(device()), valid.to(device()))
    curve = thresholds.reduce(launch.start())
    bins = ((probs[valid] * 256).ceil().nan_to_num(nan=0).long() - 1).clamp(min=0)  # NaN is in bin 0
    for name, pixels, histogram in (("on", masks[valid] > 0, curve.on), ("off", masks[valid] == 0, curve.off)):
        assert (histogram == torch.bincount(bins[pixels], minlength=256).numpy()).all(), f"histogram {name} differs"
    return "TP, FP, FN and 2 x 256 bins are the same integers"


def reused_slots(data: Path) -> str:
    """Compare the batches of an epoch with those of the CPU, while the device is busy and slots are filled again."""
    split, texts = ShardSet.open(str(data)).split("train"), []
    plain = Stream(split, BatchPlan(global_size=4, micro_size=4, world_size=1), 0)
    with plain:
        expected = torch.cat([_checksum(batch) for batch in plain.epoch()])[: len(split)]
    for micro, prefetch in ((4, 1), (16, 2), (64, 3)):
        plan = BatchPlan(global_size=micro, micro_size=micro, world_size=1)
        sums = []
        with Stream(split, plan, 0, prefetch=prefetch, device=device(), workers=4) as stream:
            for batch in stream.epoch():
                if device().type == "cuda":
                    torch.cuda._sleep(20_000_000)  # about 10 ms
                sums.append(_checksum(batch))
        found = torch.cat(sums)[: len(split)].cpu()
        assert torch.equal(found, expected), f"batches of {micro} with {prefetch} ahead differ"
        texts.append(f"{micro} with {prefetch} ahead")
    return f"{len(split)} samples arrive whole in batches of {', '.join(texts)}"


def _checksum(batch: Batch) -> Tensor:
    return batch.images.long().sum((1, 2, 3)) * 3 + batch.masks.long().sum((1, 2, 3))  # (B,)


def waits(data: Path) -> str:
    """Run the loop, and list every line at which the host waits for the device in a step that logs nothing."""

    class Watched(Trainer):
        def optimizer_step(self, step: Step) -> tuple[float, Tensor]:
            result = super().optimizer_step(step)
            watched = self.state.step + 1 in WATCHED_STEPS
            torch.cuda.set_sync_debug_mode("warn" if watched else "default")
            return result

    steps = WATCHED_STEPS.stop + 2
    config = TrainConfig(
        steps=steps, log_every=99, eval_every=99, checkpoint_every=99, compile="off", tracker=("none",)
    )
    torch.set_warn_always(True)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with contextlib.redirect_stdout(io.StringIO()):
            Watched(config, str(data), Path(folder) / "run").run()
    lines = collections.Counter(
        f"{Path(each.filename).name}:{each.lineno}" for each in caught if "synchronizing CUDA" in str(each.message)
    )
    per_step = {line: number / len(WATCHED_STEPS) for line, number in sorted(lines.items())}
    assert not per_step, f"waits per step: {json.dumps(per_step)}"
    return f"none in steps {WATCHED_STEPS.start} to {WATCHED_STEPS.stop - 1}"


def nonfinite_steps(data: Path) -> str:
    """Spoil the loss or the gradient of a step in the precision of this process: no weight may change."""
    config = TrainConfig(
        batch=BatchConfig(global_size=4), model=ModelConfig(base_channels=4), optim=OptimConfig(lr=1e-2), compile="off"
    )
    loss = segmentation_loss
    faults: dict[str, Callable[[Tensor], Tensor]] = {
        "loss and gradient NaN": lambda losses: losses * math.nan,
        "loss infinite, gradient finite": lambda losses: losses + math.inf,
        "loss NaN, gradient finite": lambda losses: losses + math.nan,
        "loss finite, gradient infinite": lambda losses: _spoil_gradient(losses),
    }
    with tempfile.TemporaryDirectory() as folder:
        step = BareStep(config, data, Path(folder) / "run")
        try:
            for _ in range(3):
                step()
            before = _weights(step.trainer)
            for name, fault in faults.items():
                isicdist.train.segmentation_loss = lambda *args, fault=fault: fault(loss(*args))
                step()
                assert torch.equal(before, _weights(step.trainer)), f"{name}: weights have changed"
            isicdist.train.segmentation_loss = loss
            step()
            assert not torch.equal(before, _weights(step.trainer)), "a finite step after them changes no weight"
            assert _weights(step.trainer).isfinite().all(), "weights are not finite"
        finally:
            isicdist.train.segmentation_loss = loss
            step.close()
    return f"skipped, weights unchanged: {', '.join(faults)}"


def _spoil_gradient(losses: Tensor) -> Tensor:
    spoiled = losses * 1.0
    spoiled.register_hook(lambda gradient: gradient * math.inf)
    return spoiled


def _weights(trainer: Trainer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


CHECKS: dict[str, Callable[[Path], str]] = {
    "dropout mask": dropout_mask,
    "augmentation": augmentation,
    "network and gradient": network_and_gradient,
    "compiled against eager": compiled_against_eager,
    "counts": counts,
    "reused slots": reused_slots,
    "waits per step": waits,
    "non-finite steps, float32": nonfinite_steps,
    "non-finite steps, bf16": nonfinite_steps,
    "non-finite steps, fp16": nonfinite_steps,
}
COMPILED_ONLY = ("compiled against eager",)
GPU_ONLY = ("waits per step", "non-finite steps, bf16", "non-finite steps, fp16")


def run_check(check: Callable[[Path], str], data: Path) -> Outcome:
    """Give the outcome of a check that has passed."""
    return Outcome(detail=check(data))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--names", nargs="+", required=True, choices=list(CHECKS))
    options = parser.parse_args()
    emit_rows({name: functools.partial(run_check, CHECKS[name], options.data) for name in options.names})


if __name__ == "__main__":
    main()
