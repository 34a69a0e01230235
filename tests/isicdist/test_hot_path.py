"""The hot path on torch's meta device: whatever waits for a device, or mixes two, raises there.

Operators and copies of a step are golden numbers, for the torch that constraints.txt pins: a kernel or a wait that
creeps in is seen. Where a change is meant, write the new numbers down and say in the commit why they differ.
"""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from isicdist.config import AugmentConfig
from isicdist.data.augment import augment
from isicdist.data.order import MASKED, Purpose, random_keys
from isicdist.data.stream import Batch, StreamState
from isicdist.data.upload import upload
from isicdist.distributed.gradients import Gradients
from isicdist.metrics.dice import DiceReduction
from isicdist.metrics.thresholds import ThresholdReduction
from isicdist.network.loss import segmentation_loss
from isicdist.network.normalise import normalise, to_unit
from isicdist.network.unet import ImprovedUNet
from isicdist.training.meter import TrainMeter
from isicdist.training.nonfinite import NonFiniteGuard
from isicdist.training.optim import Ema

META = torch.device("meta")
MICRO, SIDE = 4, 64
POSITION: StreamState = {"digest": "", "seed": 0, "window": None, "epoch": 0, "consumed": 0}
UPLOADS = ("_to_copy", "copy_")

OPERATORS_PER_MICRO_BATCH = 799
OPERATORS_PER_STEP = 31
UPLOADS_PER_MICRO_BATCH = 2


class Operators(TorchDispatchMode):
    """Counts the operators that are dispatched, by name; `uploads` are copies from the host to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.uploads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operator."""
        name = func.name().removeprefix("aten::").partition(".")[0]
        self.names[name] += 1
        result = func(*args, **(kwargs or {}))
        tensors = [value for value in args if isinstance(value, Tensor)]
        if name in UPLOADS and isinstance(result, Tensor) and result.device != tensors[-1].device:
            self.uploads += 1
        return result


class HotPath:
    """The objects of `Trainer` that a step uses, on the meta device."""

    def __init__(self) -> None:
        self.accelerator = cast(
            Accelerator,
            SimpleNamespace(
                device=META, num_processes=1, process_index=0, scaler=None, unscale_gradients=lambda _: None
            ),
        )
        self.model = ImprovedUNet(dropout=0.3).to(META)
        self.ema = Ema(self.model, 0.99)
        self.gradients = Gradients(self.model.parameters(), self.accelerator)
        self.meter = TrainMeter(self.accelerator)
        adam = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.guard = NonFiniteGuard(adam, limit=1, scaled=False, sample_names=lambda _: [])
        self.guard._seen = torch.zeros(2, dtype=torch.int64, device=META)  # the copy to the host has no data there
        indices = np.array([0, 1, 2, MASKED])
        self.batch = Batch(
            images=torch.empty((MICRO, SIDE, SIDE, 3), dtype=torch.uint8, device=META).permute(0, 3, 1, 2),
            masks=torch.empty((MICRO, 1, SIDE, SIDE), dtype=torch.uint8, device=META),
            indices=indices,
            ids=torch.empty(MICRO, dtype=torch.int64, device=META),
            step_samples=7,
        )

    def micro_batch(self) -> None:
        """As `Trainer.forward_backward`."""
        batch = self.batch
        keys = random_keys(0, 0, batch.indices, Purpose.AUGMENT)
        images, masks = augment(to_unit(batch.images), batch.masks, keys, AugmentConfig(hue=10))
        keys = upload(random_keys(0, 0, batch.indices, Purpose.DROPOUT), META)
        logits = self.model(normalise(images), keys)
        loss = (segmentation_loss(logits, masks) * batch.valid).sum() / batch.step_samples
        loss.backward()
        self.gradients.add_micro_batch(loss)
        self.meter.add_micro_batch(logits, masks, batch.valid)

    def step(self) -> None:
        """As `Trainer.optimizer_step`, without Adam, which has no meta kernel when it is fused."""
        loss = self.gradients.all_reduce()
        norm = self.gradients.clip(1.0, cast(torch.optim.Optimizer, None))
        skipped = self.guard.check(1, POSITION, loss, norm)
        self.gradients.zero()
        self.ema.update(1)
        self.meter.add_step(loss, skipped, 7)


@pytest.fixture
def hot_path() -> HotPath:
    path = HotPath()
    path.micro_batch()  # fills the caches of constants and hashes
    return path


def test_training_waits_for_no_device_and_costs_as_many_operators_as_ever(hot_path):
    with Operators() as micro_batch:
        hot_path.micro_batch()
    with Operators() as step:
        hot_path.step()
    assert micro_batch.uploads == UPLOADS_PER_MICRO_BATCH
    assert step.uploads == 0
    assert (micro_batch.names["_foreach_add_"], micro_batch.names["add_"]) == (1, 2)  # not one for each parameter
    if torch.__version__.startswith("2.13"):
        counted = (sum(micro_batch.names.values()), sum(step.names.values()))
        assert counted == (OPERATORS_PER_MICRO_BATCH, OPERATORS_PER_STEP)


def test_counting_of_an_evaluation_waits_for_no_device(hot_path):
    probs = torch.empty((MICRO, 1, SIDE, SIDE), device=META)
    for metric in (DiceReduction(), ThresholdReduction(META)):
        metric.update(probs, hot_path.batch.masks, hot_path.batch.ids, hot_path.batch.valid)


def test_a_hidden_wait_would_be_seen():
    with pytest.raises(RuntimeError, match="meta"):
        int(torch.zeros((), device=META))
