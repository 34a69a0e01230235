"""The compiled network: one graph, the same numbers, the same names of weights. Slow: `make test-slow` runs it."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from isicdist.config import AugmentConfig
from isicdist.data import augment as augmentation
from isicdist.data.order import Purpose, random_keys
from isicdist.network.unet import ImprovedUNet

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch about itself
]


def network() -> ImprovedUNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ImprovedUNet(base_channels=2, dropout=0.3).double()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_compiled_and_eager_networks_agree(layout: torch.memory_format):
    """In float64, dropout masks included; without a graph break, as accelerate prepares it.

    No gradient is added up atomically: a GPU does that in any order, and no run could be repeated bit for bit.
    """
    eager, compiled = network(), network()
    images = torch.rand((2, 3, 32, 32), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    images = images.contiguous(memory_format=layout)
    keys = torch.tensor([3, 4])
    counters.clear()
    prepared = Accelerator(cpu=True).prepare_model(compiled, evaluation_mode=True)
    prepared.compile(dynamic=False)

    def step(model: torch.nn.Module) -> Tensor:
        logits = model(images, keys)
        logits.square().mean().backward()
        return logits

    logits, code = run_and_get_code(step, prepared)
    assert not counters["graph_break"]
    assert len(code) == 2  # forward and backward
    assert not any("atomic_add" in each for each in code)
    torch.testing.assert_close(logits.double(), step(eager), rtol=0, atol=1e-6)  # accelerate gives float32
    for one, other in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-5, atol=1e-6)
    eager.load_state_dict(prepared.state_dict())  # checkpoints load both ways
    prepared.load_state_dict(eager.state_dict())


def test_compiled_and_eager_augmentations_agree():
    generator = torch.Generator().manual_seed(1)
    images = F.interpolate(torch.rand((2, 3, 8, 8), generator=generator), size=64, mode="bilinear")
    masks = (F.interpolate(torch.rand((2, 1, 4, 4), generator=generator), size=64) > 0.5).to(torch.uint8)
    keys = random_keys(0, 0, np.arange(2), Purpose.AUGMENT)
    expected = augmentation.augment(images, masks, keys, AugmentConfig(hue=10.0, saturation=(0.5, 2.0)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(augmentation, "transform", torch.compile(augmentation.transform, dynamic=False))
        found = augmentation.augment(images, masks, keys, AugmentConfig(hue=10.0, saturation=(0.5, 2.0)))
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)
    assert torch.equal(found[1], expected[1])
