"""Non-finite losses and gradients through a whole optimizer step, on 1 and 2 processes: for test_nonfinite.py.

`python step_worker.py FOLDER` writes FOLDER/WORLD.json: a row for each case. Only the last rank meets what is bad.
"""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path

import torch
from accelerate import Accelerator, debug_launcher
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from isicdist.data.stream import StreamState
from isicdist.distributed.gradients import Gradients
from isicdist.training.nonfinite import NonFiniteGuard

VALUES = {"finite": 1.0, "nan": float("nan"), "inf": float("inf"), "-inf": -float("inf")}
POSITION: StreamState = {"digest": "", "seed": 0, "window": None, "epoch": 0, "consumed": 0}


class Case:
    """One weight with its optimizer: reduce, unscale, clip, check, step, in the order of `Trainer.optimizer_step`."""

    def __init__(self, accelerator: Accelerator, *, scaled: bool) -> None:
        self.accelerator = accelerator
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if scaled else None
        if accelerator.scaler:
            accelerator.scaler.scale(torch.ones(1))  # or it has no scale yet
        accelerator.state._mixed_precision = "fp16" if scaled else "no"
        accelerator.native_amp = scaled
        self.weight = nn.Parameter(torch.ones(3))
        self.adam = torch.optim.Adam([self.weight], lr=0.1, fused=True)
        self.optimizer = AcceleratedOptimizer(self.adam, scaler=accelerator.scaler)
        self.gradients = Gradients([self.weight], accelerator)
        self.guard = NonFiniteGuard(self.adam, limit=9, scaled=scaled, sample_names=lambda position: [])

    def step(self, loss: float, gradient: float) -> bool:
        scale = self.accelerator.scaler.get_scale() if self.accelerator.scaler else 1.0
        self.weight.grad = torch.full_like(self.weight, gradient * scale)
        self.gradients.add_micro_batch(torch.tensor(loss))
        whole_loss = self.gradients.all_reduce()
        norm = self.gradients.clip(0.5, self.optimizer)
        skipped = bool(self.guard.check(1, POSITION, whole_loss, norm))
        self.optimizer.step()
        self.gradients.zero()
        return skipped

    def state(self) -> list[float]:
        moments = torch.cat([value.flatten() for value in self.adam.state[self.weight].values()])
        return [*self.weight.tolist(), *moments.tolist()]

    def scale(self) -> float | None:
        return self.accelerator.scaler.get_scale() if self.accelerator.scaler else None


def run(out: Path) -> None:
    """On each process of one world."""
    accelerator = Accelerator(cpu=True)
    last = accelerator.process_index == accelerator.num_processes - 1
    rows = []
    for loss, gradient, scaled in product(VALUES, VALUES, (False, True)):
        case = Case(accelerator, scaled=scaled)
        first = case.step(1.0, 1.0)
        before, scale = case.state(), case.scale()
        skipped = case.step(VALUES[loss] if last else 1.0, VALUES[gradient] if last else 1.0)
        same, scale_after = case.state() == before, case.scale()
        again = case.step(1.0, 1.0)
        row = {"loss": loss, "gradient": gradient, "scaled": scaled, "first": first, "skipped": skipped, "again": again}
        rows.append({**row, "same": same, "lowered": scale_after != scale, "weights": case.weight.tolist()})
    out.joinpath(f"{accelerator.num_processes}-{accelerator.process_index}.json").write_text(json.dumps(rows))
    accelerator.end_training()


if __name__ == "__main__":
    for world in (1, 2):  # forks of this process, which has imported everything
        debug_launcher(run, (Path(sys.argv[1]),), world)
