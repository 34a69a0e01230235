"""The Improved UNet: the pinned numbers, the keyed dropout, the sizes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from isicdist.network.dropout import KeyedDropout, keyed_keep
from isicdist.network.unet import ConvBeforeNorm, ImprovedUNet, NormAct, Upsample2, elementary_instance_norm


@pytest.fixture(scope="module")
def small() -> ImprovedUNet:
    torch.manual_seed(0)
    return ImprovedUNet(base_channels=4)


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


def test_the_network_has_the_numbers_of_the_paper():
    model = ImprovedUNet()
    assert sum(p.numel() for p in model.parameters()) == 3_205_715
    assert count(model, nn.Conv2d) == 30
    assert count(model, nn.InstanceNorm2d) == 25
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        assert model.eval()(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 256, 256)
    assert round(flops.get_total_flops() / 1e9, 2) == 11.17


def test_instance_norm_is_affine_and_the_same_in_evaluation():
    for module in ImprovedUNet().modules():
        if isinstance(module, nn.InstanceNorm2d):
            assert module.affine
            assert not module.track_running_stats


def test_without_deep_supervision_two_heads_are_gone(small):
    plain = ImprovedUNet(base_channels=4, deep_supervision=False)
    assert count(small, nn.Conv2d) - count(plain, nn.Conv2d) == 2
    assert plain.eval()(torch.zeros(1, 3, 32, 48)).shape == (1, 1, 32, 48)


@pytest.mark.parametrize(("height", "width"), [(40, 64), (64, 40), (8, 8)])
def test_a_size_that_is_no_multiple_of_16_is_refused(small, height, width):
    with pytest.raises(ValueError, match=f"{height}x{width}.*multiples of 16"):
        small(torch.zeros(1, 3, height, width))


def test_training_with_dropout_needs_keys(small):
    with pytest.raises(ValueError, match="needs keys"):
        small.train()(torch.zeros(1, 3, 16, 16))
    ImprovedUNet(base_channels=4, dropout=0.0)(torch.zeros(1, 3, 32, 32))  # nothing to draw


def test_the_mask_belongs_to_the_sample_and_not_to_its_place():
    torch.manual_seed(0)
    small = ImprovedUNet(base_channels=4).double()  # norms over few elements blow float32's rounding up
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    keys = torch.tensor([11, -7, 2**62, 5])
    small.train()
    together = small(images, keys)
    turned = small(images.flip(0), keys.flip(0)).flip(0)
    alone = torch.cat([small(images[i : i + 1], keys[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, turned)
    torch.testing.assert_close(together, alone)
    assert not torch.allclose(together, small(images, keys + 1))


def test_no_generator_is_consumed(small):
    before = torch.get_rng_state()
    small.train()(torch.zeros(2, 3, 32, 32), torch.tensor([1, 2]))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.9])
def test_the_rate_is_the_rate(p):
    keep = keyed_keep(torch.arange(64), 3, torch.empty(4096), p)
    deviation = (p * (1 - p) / keep.numel()) ** 0.5
    assert abs(float(keep.double().mean()) - (1 - p)) < 5 * deviation


def test_masks_of_samples_layers_and_neighbours_are_independent():
    keys = torch.arange(200)  # as alike as keys can be
    masks = keyed_keep(keys, 1, torch.empty(4096), 0.3).double()
    other = keyed_keep(keys, 2, torch.empty(4096), 0.3).double()
    between = torch.corrcoef(masks) - torch.eye(200)
    bound = 6 / 4096**0.5  # six deviations of a correlation of 4096 independent pairs
    assert between.abs().max() < bound
    layers = torch.corrcoef(torch.cat([masks, other]))[:200, 200:]
    assert layers.abs().max() < bound
    columns = masks - masks.mean()
    for shift in (1, 2, 16, 64, 256):
        lagged = (columns[:, :-shift] * columns[:, shift:]).mean() / columns.var()
        assert abs(float(lagged)) < 6 / masks.numel() ** 0.5


def test_norms_and_dropout_are_the_same_in_both_memory_layouts():
    x = torch.randn(3, 4, 6, 8, dtype=torch.float64)
    norm, dropout, keys = NormAct(4).double(), KeyedDropout(0.3, layer=1), torch.tensor([1, -2, 3])

    def through(x: Tensor) -> tuple[Tensor, ...]:
        x = x.requires_grad_()
        out = dropout(norm(x), keys)
        assert out.stride() == x.stride()
        return out, *torch.autograd.grad(out.square().sum(), (x, *norm.parameters()))

    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    torch.testing.assert_close(through(x), through(x.detach().contiguous(memory_format=torch.channels_last)))


def test_a_bias_before_a_norm_would_have_no_effect(monkeypatch):
    model, images = ImprovedUNet(base_channels=2, dropout=0.0).double(), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    unused = [module for module in model.modules() if isinstance(module, ConvBeforeNorm)]
    assert len(unused) == 20
    for module in unused:
        assert module.bias is not None
        torch.nn.init.normal_(module.bias)
    logits = model(images)
    monkeypatch.setattr(ConvBeforeNorm, "forward", nn.Conv2d.forward)
    torch.testing.assert_close(model(images), logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_up_sampling_that_is_compiled_is_the_same_in_the_same_layout(layout, monkeypatch):
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=layout)
    expected = Upsample2()(x)
    monkeypatch.setattr(torch.compiler, "is_dynamo_compiling", lambda: True)
    found = Upsample2()(x)
    assert torch.equal(found, expected)
    assert found.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_elementary_instance_norm_is_torchs_and_keeps_the_layout(layout):
    def through(norm: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        inputs = [each.clone().requires_grad_() for each in (x, weight, bias)]
        out = norm(inputs[0], weight=inputs[1], bias=inputs[2], eps=1e-5)
        return out, *torch.autograd.grad((out * factors).sum(), inputs)

    x, factors = (torch.randn(3, 4, 6, 8, dtype=torch.float64).contiguous(memory_format=layout) for _ in range(2))
    weight, bias = (torch.randn(4, dtype=torch.float64) for _ in range(2))
    found = through(elementary_instance_norm)
    torch.testing.assert_close(found, through(F.instance_norm))
    assert found[0].stride() == found[1].stride() == x.stride()


def test_the_elementary_instance_norm_of_bfloat16_has_statistics_of_float32():
    x = (100 + torch.randn(2, 4, 64, 64)).bfloat16()
    out = elementary_instance_norm(x, torch.ones(4), torch.zeros(4), 1e-5)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, F.instance_norm(x.float()).bfloat16())


@pytest.mark.parametrize("bfloat16", [True, False])
def test_a_cpu_runs_bfloat16_channels_last_and_float32_not(small, bfloat16):
    layouts = []
    hooks = [
        module.register_forward_hook(
            lambda module, inputs, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last))
        )
        for module in small.modules()
        if isinstance(module, NormAct | KeyedDropout)
    ]
    images = torch.randn(2, 64, 64, 3).permute(0, 3, 1, 2)  # as the stream decodes them
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        small.train()(images, torch.tensor([1, 2]))
    for hook in hooks:
        hook.remove()
    assert len(layouts) == 25 + 5
    assert set(layouts) == {bfloat16}


def test_the_masks_are_those_of_every_version_so_far():
    keep = keyed_keep(torch.tensor([0, 1, -7, 2**62]), 3, torch.empty(5, 6, 7), 0.3)
    bits = np.packbits(keep.numpy()).tobytes()
    assert hashlib.sha256(bits).hexdigest()[:16] == "d0e70f4022121526"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dropout_multiplies_by_the_mask_of_keyed_keep_and_the_scale(dtype, layout):
    x = torch.randn(3, 4, 6, 8, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    keys = torch.tensor([1, -2, 3])
    out = KeyedDropout(0.3, layer=2)(x, keys)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    factor = keyed_keep(keys, 2, x[0], 0.3).to(dtype) * torch.tensor(1 / 0.7, dtype=dtype)
    assert torch.equal(out, x * factor)
    assert torch.equal(gradient, factor)


def test_dropout_scales_what_stays():
    layer = KeyedDropout(0.25, layer=1)
    out = layer(torch.ones(2, 3, 8, 8), torch.tensor([1, 2]))
    assert set(out.unique().tolist()) <= {0.0, torch.tensor(1 / 0.75).item()}
    assert torch.equal(layer.eval()(out, None), out)
    with pytest.raises(ValueError, match=r"dropout 1\.0"):
        KeyedDropout(1.0, layer=1)
