"""Benchmark of one training step and of what makes it cheaper.

    python benchmarks/train_step.py [--side 128] [--batch 8]

The Improved UNet with dropout, loss and Adam on a batch that lies on the device already. The first row is how a run
trains, in bf16 where the device computes in it; every other row changes one thing about it. They take turns; ratios
are taken within a round, and the medians are over the rounds. On a CPU the ratio is one of CPU seconds, which other
work on the machine disturbs least; on a GPU one of wall seconds. `--compile` adds torch.compile and says how long it
takes to begin.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date

import numpy as np
import torch
from torch import Tensor, nn

from isicdist.config import AugmentConfig, TrainConfig
from isicdist.data.augment import augment
from isicdist.distributed.launch import disable_malloc_trim
from isicdist.network.cpu_precision import faster_cpu_precision
from isicdist.network.dropout import KeyedDropout
from isicdist.network.loss import segmentation_loss
from isicdist.network.normalise import normalise, to_unit
from isicdist.network.unet import ContextModule, ImprovedUNet, NormAct
from isicdist.settings_file import load_recipe
from isicdist.training.optim import Ema

Step = Callable[[], object]


class PlainDropout(nn.Module):
    """torch's dropout in the place of the keyed one."""

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        return nn.functional.dropout(x, 0.3, self.training)


def channels_first(network: ImprovedUNet) -> None:
    """Keep the layout of (B, C, H, W) also where the network would choose the other one."""
    network.stem.register_forward_pre_hook(lambda module, inputs: inputs[0].contiguous())


def channels_last(network: nn.Module) -> None:
    """Give the weights of convolutions, and what the submodule `stem` gets, this memory layout."""
    for convolution in network.modules():
        if isinstance(convolution, nn.Conv2d):
            convolution.weight.data = convolution.weight.data.contiguous(memory_format=torch.channels_last)
    network.get_submodule("stem").register_forward_pre_hook(
        lambda module, inputs: inputs[0].contiguous(memory_format=torch.channels_last)
    )


def without_dropout(network: ImprovedUNet) -> None:
    for module in network.modules():
        if isinstance(module, KeyedDropout):
            module.p = 0.0


def plain_dropout(network: ImprovedUNet) -> None:
    for module in network.context:
        module.dropout = PlainDropout()


def without_idle_biases(network: ImprovedUNet) -> None:
    """Leave out the biases that a norm takes away again: of convolutions with a norm right behind them."""
    for module in network.modules():
        if isinstance(module, ContextModule) and isinstance(module.norm2, NormAct):
            module.conv1.bias = None
        if isinstance(module, nn.Sequential) and not isinstance(module, NormAct):
            for convolution in module:
                if isinstance(convolution, nn.Conv2d):
                    convolution.bias = None


class Bench:
    """A batch on a device, and steps on it."""

    def __init__(self, device: torch.device, batch: int, side: int) -> None:
        self.device = device
        self.narrow = device.type == "cuda" or faster_cpu_precision() == "bf16"
        """Whether a run trains in bf16."""
        rng = np.random.default_rng(0)
        self.images = torch.from_numpy(rng.integers(0, 256, (batch, 3, side, side), dtype=np.uint8)).to(device)
        self.masks = torch.from_numpy(rng.integers(0, 2, (batch, 1, side, side), dtype=np.uint8)).to(device)
        self.numbers = rng.integers(0, 2**62, batch)
        self.keys = torch.from_numpy(self.numbers).to(device)

    def step(
        self,
        *changes: Callable[[ImprovedUNet], None],
        narrow: bool | None = None,
        compiled: bool = False,
        fused: bool = True,
    ) -> Step:
        """Forward, backward and Adam of a network after `changes` to it; `narrow`: in bf16, or as a run would."""
        torch.manual_seed(0)
        network = ImprovedUNet().to(self.device)
        for change in changes:
            change(network)
        optimizer = torch.optim.Adam(network.parameters(), 1e-4, fused=fused)
        forward = torch.compile(network) if compiled else network
        narrow = self.narrow if narrow is None else narrow
        inputs = normalise(to_unit(self.images))

        def run() -> None:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=narrow):
                logits = forward(inputs, self.keys)
            segmentation_loss(logits, self.masks).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    def augmentation(self, config: AugmentConfig) -> Step:
        """Augmentation alone, from uint8 to the network's input."""
        return lambda: normalise(augment(to_unit(self.images), self.masks, self.numbers, config)[0])

    def average(self) -> Step:
        """The moving average of the weights alone."""
        network = ImprovedUNet().to(self.device)
        ema = Ema(network, 0.99)
        return lambda: ema.update(1000)

    def seconds(self, step: Step) -> tuple[float, float]:
        """Wall and CPU seconds of one step."""
        self.wait()
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        self.wait()
        return time.perf_counter() - wall, time.process_time() - cpu

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def contenders(bench: Bench, compiled: bool) -> dict[str, Step]:
    """The rows of the table: the first is what the others are compared with."""
    recipe = AugmentConfig(**load_recipe("isic2018-128")["augment"])
    own, other = ("bf16", "float32") if bench.narrow else ("float32", "bf16")
    last = bench.narrow and bench.device.type == "cpu"  # the network chooses the layout of its own accord
    rows = {
        own: bench.step(),
        f"{own}, channels {'first' if last else 'last'}": bench.step(channels_first if last else channels_last),
        other: bench.step(narrow=not bench.narrow),
        f"{other}, channels last": bench.step(channels_last, narrow=not bench.narrow),
        f"{own}, Adam not fused": bench.step(fused=False),
        f"{own}, no biases before norms": bench.step(without_idle_biases),
        f"{own}, torch's dropout": bench.step(plain_dropout),
        f"{own}, no dropout": bench.step(without_dropout),
        "augmentation alone, recipe isic2018-128": bench.augmentation(recipe),
        "augmentation alone, the paper's": bench.augmentation(TrainConfig().augment),
        "moving average of the weights alone": bench.average(),
    }
    if compiled:
        rows |= {f"{own}, compiled": bench.step(compiled=True)}
        rows |= {f"{own}, compiled, channels last": bench.step(channels_last, compiled=True)}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of torch, on a CPU")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    disable_malloc_trim()  # as a run does
    bench = Bench(torch.device(words.device), words.batch, words.side)
    rows = contenders(bench, words.compile)

    load = os.getloadavg()[0]
    begins = {name: bench.seconds(step)[0] for name, step in rows.items()}
    for step in rows.values():
        step()
    rounds = [{name: bench.seconds(step) for name, step in rows.items()} for _ in range(words.rounds)]
    clock = 0 if bench.device.type == "cuda" else 1
    first = next(iter(rows))
    print("| step | images/s | wall ms | CPU ms | of the first row's time | first step, s |\n|---|---|---|---|---|---|")
    for name in rows:
        wall, cpu = (statistics.median(times[name][i] for times in rounds) for i in (0, 1))
        share = statistics.median(times[name][clock] / times[first][clock] for times in rounds)
        print(
            f"| {name} | {words.batch / (wall, cpu)[clock]:.1f} | {1000 * wall:.1f} | {1000 * cpu:.1f} | {share:.3f} "
            f"| {begins[name]:.1f} |"
        )
    device = torch.cuda.get_device_name() if clock == 0 else f"{platform.machine()}, {words.threads} thread(s)"
    print(
        f"\n{date.today()}: {words.batch} images of {words.side} × {words.side}, medians of {words.rounds} rounds; "
        f"{device}, torch {torch.__version__}; load before {load:.1f}"
    )


if __name__ == "__main__":
    main()
