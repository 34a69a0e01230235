"""Resume on two ranks of which each has a RUN folder of its own: for test_state.py.

`python resume_worker.py FOLDER`: FOLDER/run has a checkpoint, of which rank 1 sees another one, with the same name.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, debug_launcher

from isicdist.config import TrainConfig
from isicdist.network.unet import ImprovedUNet
from isicdist.training import checkpoint
from isicdist.training.checkpoint import Snapshot
from isicdist.training.optim import EarlyStopping
from isicdist.training.state import RunLock, RunRecord, TrainState, find_checkpoint, restore_weights


def build(seed: int) -> tuple[ImprovedUNet, torch.optim.Adam]:
    torch.manual_seed(seed)
    model = ImprovedUNet(base_channels=2)
    return model, torch.optim.Adam(model.parameters(), lr=0.1, fused=True)


def save(run: Path, seed: int, record: RunRecord) -> None:
    model, adam = build(seed)
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    adam.step()
    state = TrainState(
        stream={"digest": "", "seed": 0, "window": None, "epoch": 0, "consumed": seed},
        step=4,
        early_stopping=EarlyStopping(patience=0),
        config=record.to_json(),
    )
    checkpoint.save(run, Snapshot.of(model, model, adam), state.to_json(), keep=1)


def digest(model: torch.nn.Module, adam: torch.optim.Adam) -> str:
    tensors = [*model.state_dict().values()]
    tensors += [value for moments in adam.state_dict()["state"].values() for value in moments.values()]
    return hashlib.sha256(b"".join(each.numpy().tobytes() for each in tensors)).hexdigest()


def run(folder: Path) -> None:
    """On each process."""
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    record = RunRecord.of(TrainConfig(), "digest", accelerator)
    of_rank = {}
    for case in ("other", "none"):  # what the disk of rank 1 has
        path = folder / f"{case}-{rank}"
        if rank == 0 or case == "other":
            save(path, 1 + rank, record)
        found = find_checkpoint(path, record, accelerator, RunLock(path))
        assert found
        model, adam = build(0)
        restore_weights(found, model, model, adam)
        of_rank[case] = [digest(model, adam), found.state["stream"]["consumed"]]
    (folder / f"{rank}.json").write_text(json.dumps(of_rank))
    accelerator.end_training()


if __name__ == "__main__":
    debug_launcher(run, (Path(sys.argv[1]),), 2)
