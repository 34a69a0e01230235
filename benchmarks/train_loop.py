"""Benchmark of the training loop, next to the bare step and other loops.

    python benchmarks/train_loop.py --data SET
    pip install -c constraints.txt -e '.[bench]'

SET is a shard set of one size. Every contender trains the same network with the same loss, Adam, precision and batch:

    bare        forward, backward and step on tensors that lie there already: no data, no log
    apart       the same, but each process for itself: nothing is exchanged
    isicdist    `isicdist train` as it is: stream, augmentation, the step, Dice, moving average, log
    accelerate  a plain loop of accelerate over a torch DataLoader of JPEG and PNG files with two workers, mirrored
                and turned; one loss is read per step
    monai       the same loop over MONAI's Dataset, with its transforms, under its DataLoader

Contenders take turns in one process; ratios are taken within a round, medians are over the rounds. Then the same on
two processes of one thread each, with the same batch on each: `weak scaling` is the ratio to twice one process.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from isicdist.config import AugmentConfig, BatchConfig, OptimConfig, TrainConfig
from isicdist.distributed import launch as processes
from isicdist.network.loss import segmentation_loss
from isicdist.network.normalise import normalise, to_unit
from isicdist.network.unet import ImprovedUNet
from isicdist.settings_file import load_recipe
from isicdist.train import train
from shards.reader import ShardSet

ROOT = Path(__file__).resolve().parent.parent
CONTENDERS = ("bare", "apart", "isicdist", "accelerate", "monai")


class Files(Dataset[tuple[Tensor, Tensor, int]]):
    """Images and masks as files, decoded by Pillow, mirrored and turned."""

    def __init__(self, folder: Path) -> None:
        self.images = sorted(folder.glob("*.jpg"))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, int]:
        path = self.images[number]
        with Image.open(path) as picture, Image.open(path.with_suffix(".mask.png")) as truth:
            image, mask = np.asarray(picture.convert("RGB")), np.asarray(truth.convert("1"))
        turns, mirrored = np.random.randint(4), np.random.randint(2)
        image, mask = (np.rot90(part[:, ::-1] if mirrored else part, turns).copy() for part in (image, mask))
        return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(mask)[None].to(torch.uint8), number


def monai_dataset(folder: Path) -> Any:
    """The same with MONAI's reader and transforms."""
    from monai.data.dataset import Dataset as MonaiDataset  # pyright: ignore[reportMissingImports]
    from monai.transforms.compose import Compose  # pyright: ignore[reportMissingImports]
    from monai.transforms.io.dictionary import LoadImaged  # pyright: ignore[reportMissingImports]
    from monai.transforms.spatial.dictionary import RandFlipd, RandRotate90d  # pyright: ignore[reportMissingImports]
    from monai.transforms.utility.dictionary import EnsureChannelFirstd  # pyright: ignore[reportMissingImports]

    both = ["image", "mask"]
    steps = [LoadImaged(both), EnsureChannelFirstd(both), RandFlipd(both, 0.5, 0), RandRotate90d(both, 0.75)]
    rows = [{"image": path, "mask": path.with_suffix(".mask.png")} for path in sorted(folder.glob("*.jpg"))]
    return MonaiDataset(rows, Compose(steps))


def plain_loop(
    batches: Iterable[tuple[Tensor, Tensor]], accelerator: Accelerator, warm: int, steps: int, *, apart: bool = False
) -> float:
    """Seconds of `steps` steps of the usual loop over float images in [0, 1] and masks, after `warm` others.

    `apart`: gradients are not exchanged.
    """
    torch.manual_seed(0)
    network = ImprovedUNet()
    optimizer = accelerator.prepare_optimizer(torch.optim.Adam(network.parameters(), 2e-3, fused=True))
    network = accelerator.prepare_model(network, evaluation_mode=apart)
    start = 0.0
    for step, (images, masks) in enumerate(batches):
        if step == warm:
            accelerator.wait_for_everyone()
            start = time.perf_counter()
        logits = network(normalise(images), torch.arange(len(images)))
        loss = segmentation_loss(logits, masks).mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        if step + 1 == warm + steps:
            break
    return time.perf_counter() - start


def bare(accelerator: Accelerator, batch: int, side: int, warm: int, steps: int, *, apart: bool) -> float:
    """Seconds of `steps` steps on one batch that lies there. `apart`: gradients are not exchanged."""
    images, masks = torch.rand(batch, 3, side, side), torch.randint(0, 2, (batch, 1, side, side), dtype=torch.uint8)
    return plain_loop(((images, masks) for _ in range(warm + steps)), accelerator, warm, steps, apart=apart)


def loaded(dataset: Any, loader: type, accelerator: Accelerator, batch: int, warm: int, steps: int) -> float:
    """Seconds of `steps` steps of the usual loop over a loader."""

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        prepared = accelerator.prepare(loader(dataset, batch_size=batch, shuffle=True, num_workers=2, drop_last=True))
        while True:
            for found in prepared:
                if isinstance(found, dict):
                    yield found["image"].as_tensor() / 255, (found["mask"].as_tensor() > 0).to(torch.uint8)
                else:
                    yield to_unit(found[0]), found[1]

    return plain_loop(batches(), accelerator, warm, steps)


def ours(data: str, folder: Path, world: int, batch: int, steps: int) -> tuple[float, float]:
    """Seconds of `steps` steps of a run after as many to warm up, and the share of them spent waiting for data."""
    config = TrainConfig(
        steps=2 * steps,
        log_every=steps,
        batch=BatchConfig(global_size=batch * world),
        optim=OptimConfig(ema_decay=0.99),
        # All pixels in every step, as the others have them.
        augment=AugmentConfig(**load_recipe("isic2018-128")["augment"] | {"progressive_resize_fraction": 0.0}),
    )
    with contextlib.redirect_stdout(io.StringIO()):
        train(config, data, folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["event"] == "train"][-1]
    return steps * batch * world / last["images_per_s"], last["data_wait"]


def work(data: str, folder: Path, batch: int, steps: int, rounds: int) -> list[dict[str, float]]:
    """Measure on the processes there are: images per second of each contender, round by round.

    `folder` holds the training split as files; runs are written there too.
    """
    accelerator = processes.start()
    Accelerator.end_training = lambda self: None  # `train` would end the process group for those after it
    world, side = accelerator.num_processes, ShardSet.open(data).size or 0
    from monai.data.dataloader import DataLoader as MonaiLoader  # pyright: ignore[reportMissingImports]

    found: list[dict[str, float]] = []
    for number in range(rounds):
        seconds = {"bare": bare(accelerator, batch, side, 2, steps, apart=False)}
        seconds["apart"] = bare(accelerator, batch, side, 2, steps, apart=True)
        seconds["isicdist"], wait = ours(data, folder / f"run-{world}-{number}", world, batch, steps)
        seconds["accelerate"] = loaded(Files(folder), DataLoader, accelerator, batch, 2, steps)
        seconds["monai"] = loaded(monai_dataset(folder), MonaiLoader, accelerator, batch, 2, steps)
        found.append({name: world * batch * steps / took for name, took in seconds.items()} | {"data wait": wait})
    return found


def unpack(data: Path, folder: Path) -> None:
    """The training split as files KEY.jpg, KEY.mask.png."""
    for shard in sorted((data / "train").glob("*.tar")):
        with tarfile.open(shard) as members:
            for member in members:
                if member.name.endswith((".jpg", ".mask.png")) and (found := members.extractfile(member)):
                    (folder / Path(member.name).name).write_bytes(found.read())


def launch(count: int, words: list[str]) -> list[dict[str, float]]:
    """What `work` measures on `count` processes of one thread each."""
    several = ["--multi_gpu", "--main_process_port", "0"] if count > 1 else []
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--num_processes", str(count)]
    command += ["--mixed_precision", "bf16", "--dynamo_backend", "no", *several, __file__, "--work", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    environment |= {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=8, help="images of one process")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.work:
        found = work(str(words.data), words.work, words.batch, words.steps, words.rounds)
        if os.environ.get("RANK", "0") == "0":
            print("\n" + json.dumps(found))
        return

    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        unpack(words.data, Path(folder))
        given = [folder, "--data", str(words.data), "--batch", str(words.batch), "--steps", str(words.steps)]
        found = {count: launch(count, [*given, "--rounds", str(words.rounds)]) for count in (1, 2)}
    print(
        "| contender | 1 process, images/s | of bare | 2 processes, images/s | of bare | weak scaling |\n"
        + "|---" * 6
        + "|"
    )
    for name in CONTENDERS:
        rate = {count: statistics.median(line[name] for line in rounds) for count, rounds in found.items()}
        share = {n: statistics.median(line[name] / line["bare"] for line in rounds) for n, rounds in found.items()}
        cells = f"{rate[1]:.1f} | {share[1]:.3f} | {rate[2]:.1f} | {share[2]:.3f} | {rate[2] / rate[1] / 2:.3f}"
        print(f"| {name} | {cells} |")
    waits = [100 * statistics.median(line["data wait"] for line in rounds) for rounds in found.values()]
    print(
        f"\n{date.today()}: {words.batch} images of {ShardSet.open(words.data).size} pixels per process and step, "
        f"{words.steps} steps, medians of {words.rounds} rounds; isicdist waited for data {waits[0]:.1f} % and "
        f"{waits[1]:.1f} % of the time; {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"accelerate {version('accelerate')}, monai {version('monai')}; load before {load:.1f}"
    )


if __name__ == "__main__":
    main()
