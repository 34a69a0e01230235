"""Benchmark of the Dice of a split, next to other libraries.

    python benchmarks/dice.py --data SET --checkpoint RUN
    pip install -c constraints.txt -e '.[bench]'

A model predicts a split once on two processes; then each contender is given the same predictions, in the same
batches, and has to come to one score that every process knows. They take turns; medians are over the rounds.

    isicdist          DiceReduction: all four scores at one threshold, from integers
    with thresholds   and ThresholdReduction beside it: every threshold, average precision, calibration
    masks gathered    `Accelerator.gather_for_metrics` of each batch's masks, as the tutorials have it, then the mean
    monai             DiceMetric(ignore_empty=False)
    torchmetrics      DiceScore(num_classes=1, aggregation_level="samplewise")

Bytes are what a process hands to the collectives of torch.distributed.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from monai.metrics.meandice import DiceMetric  # pyright: ignore[reportMissingImports]
from torch import Tensor, distributed
from torchmetrics.segmentation import DiceScore  # pyright: ignore[reportMissingImports]

from isicdist.distributed import launch as processes
from isicdist.metrics.dice import DiceReduction, per_image_scores
from isicdist.metrics.thresholds import ThresholdReduction
from isicdist.network.segmenter import load_model
from isicdist.training.scoring import Metric, score
from shards.reader import ShardSet

ROOT = Path(__file__).resolve().parent.parent
COLLECTIVES = ("all_reduce", "broadcast", "all_gather", "all_gather_into_tensor")

Batch = tuple[Tensor, Tensor, Tensor, Tensor]
"""probs (B, 1, H, W), masks (B, 1, H, W), sample numbers (B,), places that hold an image (B,)."""


class Recorder:
    """Keeps every batch it is shown, and the seconds that the metrics of an evaluation take for it."""

    def __init__(self, *metrics: Metric) -> None:
        self.batches: list[Batch] = []
        self.seconds = 0.0
        self._metrics = metrics

    def update(self, probs: Tensor, masks: Tensor, ids: Tensor, valid: Tensor) -> None:
        """Count one batch, and keep it; a place without an image repeats the first, as a padding sampler has it."""
        start = time.perf_counter()
        for metric in self._metrics:
            metric.update(probs, masks, ids, valid)
        self.seconds += time.perf_counter() - start
        places = torch.where(valid, torch.arange(len(valid)), 0)
        self.batches.append((probs[places], masks[places], ids[places], valid))


def isicdist(batches: list[Batch], told: bool, accelerator: Accelerator) -> float:
    """The mean Dice; `told` which places repeat an image, or not."""
    reduction = DiceReduction()
    for probs, masks, ids, valid in batches:
        reduction.update(probs, masks, ids, valid if told else None)
    return reduction.reduce(accelerator).mean_dice


def with_thresholds(batches: list[Batch], told: bool, accelerator: Accelerator) -> float:
    """As `isicdist`, and the scores at every threshold."""
    thresholds = ThresholdReduction(accelerator.device)
    for probs, masks, ids, valid in batches:
        thresholds.update(probs, masks, ids, valid if told else torch.ones_like(valid))
    thresholds.reduce(accelerator)
    return isicdist(batches, told, accelerator)


def masks_gathered(batches: list[Batch], told: bool, accelerator: Accelerator) -> float:
    """Every process gets the masks of all."""
    dices = []
    for probs, masks, _, valid in batches:
        mine = (probs > 0.5).to(torch.uint8), masks, valid
        predictions, truths, valid = accelerator.gather_for_metrics(mine)
        common, area = (predictions & truths).sum((1, 2, 3)), (predictions + truths).sum((1, 2, 3))
        dice = torch.where(area > 0, 2 * common / area, 1)
        dices.append(dice[valid] if told else dice)
    return torch.cat(dices).mean().item()


def monai(batches: list[Batch], told: bool, accelerator: Accelerator | None = None) -> float:
    """Each image's Dice is kept where it was counted, and gathered at the end."""
    metric = DiceMetric(ignore_empty=False)
    for probs, masks, _, valid in batches:
        predictions = (probs > 0.5).to(torch.uint8)
        metric(*((predictions[valid], masks[valid]) if told else (predictions, masks)))
    return torch.as_tensor(metric.aggregate()).item()


def torchmetrics(batches: list[Batch], told: bool, accelerator: Accelerator | None = None) -> float:
    """Numerators and denominators are kept, and gathered at the end."""
    metric = DiceScore(num_classes=1, aggregation_level="samplewise")
    for probs, masks, _, valid in batches:
        predictions = (probs > 0.5).to(torch.uint8)
        metric.update(*((predictions[valid], masks[valid]) if told else (predictions, masks)))
    return metric.compute().item()


CONTENDERS: dict[str, Callable[[list[Batch], bool, Accelerator], float]] = {
    "isicdist": isicdist,
    "with thresholds": with_thresholds,
    "masks gathered": masks_gathered,
    "monai": monai,
    "torchmetrics": torchmetrics,
}


def counted_bytes(run: Callable[[], object]) -> int:
    """Bytes that this process hands to the collectives while `run` runs."""
    total, originals = 0, {name: getattr(distributed, name) for name in COLLECTIVES}

    def counting(name: str) -> Callable[..., Any]:
        def call(*words: Any, **named: Any) -> Any:
            nonlocal total
            given = words[1] if name.startswith("all_gather") else words[0]
            total += given.nbytes
            return originals[name](*words, **named)

        return call

    for name in COLLECTIVES:
        setattr(distributed, name, counting(name))
    run()
    for name, original in originals.items():
        setattr(distributed, name, original)
    return total


def on_empty_masks() -> dict[str, list[float]]:
    """What each says of an image without a lesion: nothing predicted; every pixel predicted."""
    masks, ids, valid = torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.tensor([0]), torch.tensor([True])
    batches: list[Batch] = [(masks + filled, masks, ids, valid) for filled in (0.0, 1.0)]
    dice, _ = per_image_scores(np.array([[0, 0, 0, 0], [1, 0, 64, 0]]))
    return {
        "isicdist": dice.tolist(),
        "monai": [monai([batch], True) for batch in batches],
        "torchmetrics": [torchmetrics([batch], True) for batch in batches],
    }


def work(data: str, checkpoint: Path, split_name: str, rounds: int) -> dict[str, Any]:
    """Measure on the processes there are; what one of them says is as good as what another does."""
    accelerator = processes.start()
    model, split = load_model(checkpoint), ShardSet.open(data).split(split_name)
    model.network = accelerator.prepare_model(model.network, evaluation_mode=True)
    score(model, split, accelerator)  # warms up
    reduction, thresholds = DiceReduction(expected=len(split)), ThresholdReduction(accelerator.device)
    recorder = Recorder(reduction, thresholds)
    start = time.perf_counter()
    score(model, split, accelerator, metrics=[recorder])
    evaluation = time.perf_counter() - start
    start = time.perf_counter()
    reduction.reduce(accelerator)
    thresholds.reduce(accelerator)
    counting = recorder.seconds + time.perf_counter() - start

    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    with torch.inference_mode():
        for _ in range(rounds + 1):
            for name, contender in CONTENDERS.items():
                accelerator.wait_for_everyone()
                start = time.perf_counter()
                contender(recorder.batches, True, accelerator)
                seconds[name].append(time.perf_counter() - start)
        found = {
            name: {
                "milliseconds": 1000 * statistics.median(seconds[name][1:]),
                "bytes": counted_bytes(functools.partial(contender, recorder.batches, True, accelerator)),
                "mean_dice": contender(recorder.batches, True, accelerator),
                "padded": contender(recorder.batches, False, accelerator),
            }
            for name, contender in CONTENDERS.items()
        }
    result = {
        "contenders": found,
        "images": len(split),
        "side": split.size,
        "repeated": sum(int((~valid).sum()) for *_, valid in recorder.batches),
        "evaluation_s": evaluation,
        "counting_s": counting,
        "device": str(accelerator.device),
    }
    accelerator.end_training()
    return result


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Run `work` on two processes (on the CPU) and return what the first one found."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        words = ["--data", given.data, "--checkpoint", given.checkpoint, "--split", given.split]
        launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1]
        launch += ["--main_process_port", 0, "--mixed_precision", "no", "--dynamo_backend", "no", __file__]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, *launch, *words, "--rounds", given.rounds, "--work", out]
        subprocess.run([str(word) for word in command], check=True, env=environment)
        return json.loads(out.read_text())


def main() -> None:
    """Measure and write the result as benchmarks/results/<date>-dice.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the shard set")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run trained on it")
    parser.add_argument("--split", default="test")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        result = work(given.data, given.checkpoint, given.split, given.rounds)
        if os.environ["RANK"] == "0":
            given.work.write_text(json.dumps(result))
        return
    load = os.getloadavg()[0]
    found = measure(given)
    lines = ["| contender | ms | bytes sent by a process | mean Dice | padding not told |", "|---|---|---|---|---|"]
    for name, row in found["contenders"].items():
        scores = f"{row['mean_dice']:.9f} | {row['padded']:.9f}"
        lines.append(f"| {name} | {row['milliseconds']:.1f} | {row['bytes']:,} | {scores} |")
    empty = ["| contender | nothing predicted | something predicted |", "|---|---|---|"]
    empty += [f"| {name} | {values[0]:g} | {values[1]:g} |" for name, values in on_empty_masks().items()]
    packages = ("torch", "accelerate", "monai", "torchmetrics")
    share = found["counting_s"] / found["evaluation_s"]
    text = f"""# The Dice of a split, {date.today()}

{found["images"]} images of {found["side"]} × {found["side"]} on 2 processes ({found["device"]}, gloo), medians of
{given.rounds} rounds after one to warm up (`python benchmarks/dice.py`). Load of the machine before: {load:.1f}.

{chr(10).join(lines)}

"Padding not told": the first process's last batch repeats an image {found["repeated"]} times, as a sampler that pads
has it, and nobody says so.

In an evaluation, counting at one threshold and at all of them, and both reductions, took {found["counting_s"]:.3f} s of
{found["evaluation_s"]:.1f} s: {share:.2%}.

An image without a lesion scores:

{chr(10).join(empty)}

{platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, \
{", ".join(f"{package} {version(package)}" for package in packages)}
"""
    print(text)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / f"{date.today()}-dice.md").write_text(text)


if __name__ == "__main__":
    main()
