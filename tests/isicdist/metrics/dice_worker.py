"""Score generated images on 1, 2, 3 and 4 processes: for test_dice.py.

`python dice_worker.py FOLDER N...` writes FOLDER/WORLD.json, a summary for each N.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, debug_launcher

from isicdist.metrics.dice import DiceReduction
from isicdist.metrics.thresholds import ThresholdReduction


def scored(n: int, accelerator: Accelerator) -> dict[str, object]:
    """The summary of `n` images as JSON, its floats to the last bit."""
    reduction, thresholds = DiceReduction(expected=n), ThresholdReduction(accelerator.device)
    for image in range(accelerator.process_index, n, accelerator.num_processes):
        generator = torch.Generator().manual_seed(image)
        probs = torch.rand(1, 1, 17, 13, generator=generator)
        masks = torch.rand(1, 1, 17, 13, generator=generator) > 0.7
        for metric in (reduction, thresholds):
            metric.update(probs, masks, torch.tensor([image]), torch.tensor([True]))
    summary, curve = reduction.reduce(accelerator), thresholds.reduce(accelerator)
    assert curve.dice[128] == summary.pooled_dice  # the threshold 0.5
    everywhere = accelerator.gather(torch.tensor([summary.mean_dice], dtype=torch.float64))
    assert (torch.as_tensor(everywhere) == summary.mean_dice).all()
    scores = {name: float(value).hex() for name, value in summary.scores().items() if name != "n"}
    return {"n": summary.n, **scores, "rows": summary.rows.tolist(), "on": curve.on.tolist(), "off": curve.off.tolist()}


def score(sizes: list[int], out: Path) -> None:
    """On each process of one world."""
    accelerator = Accelerator(cpu=True)
    summaries = [scored(n, accelerator) for n in sizes]
    if accelerator.is_main_process:
        out.joinpath(f"{accelerator.num_processes}.json").write_text(json.dumps(summaries))
    accelerator.end_training()


if __name__ == "__main__":
    folder, sizes = Path(sys.argv[1]), [int(word) for word in sys.argv[2:]]
    for world in (1, 2, 3, 4):  # forks of this process, which has imported everything
        debug_launcher(score, (sizes, folder), world)
