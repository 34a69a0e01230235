"""What may change between two starts of a run, and what may not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from isicdist.config import OptimConfig, TrainConfig
from isicdist.errors import StoppedError
from isicdist.run_folder import REQUEUE_NAME
from isicdist.training.checkpoint import Checkpoint, Snapshot
from isicdist.training.optim import EarlyStopping
from isicdist.training.state import (
    RunLock,
    RunRecord,
    TrainState,
    changed_settings,
    find_checkpoint,
    restore_weights,
)
from shards.errors import UsageError

RUN = Path("runs/one")


def record(**more: object) -> dict:
    return {**TrainConfig().to_json(), "data_digest": "abc", "world_size": 1, **more}


def test_each_change_is_one_line_and_no_change_is_none():
    after = {**record(world_size=2), "optim": TrainConfig(optim=OptimConfig(lr=0.001)).to_json()["optim"]}
    assert changed_settings(record(), after, RUN) == ["optim.lr 0.002 -> 0.001", "world_size 1 -> 2"]
    assert changed_settings(record(), record(), RUN) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data_digest": "def"}, "data_digest abc, and cannot go on with def"),
        ({"seed": 1}, "seed 0, and cannot go on with 1"),
        ({"fold": "1/5"}, "fold , and cannot go on with 1/5"),
        ({"model": {**record()["model"], "base_channels": 8}}, "model.base_channels 16, and cannot go on with 8"),
    ],
)
def test_what_the_run_stands_on_cannot_change(change, said):
    with pytest.raises(UsageError, match=f"^runs/one: trained with {said}; choose another --run"):
        changed_settings(record(), record(**change), RUN)


def test_every_rank_resumes_from_what_the_disk_of_rank_0_has(python, tmp_path):
    """Weights, the optimizer's moments and the state: on rank 1 lies another checkpoint of that step, or none."""
    done = python(Path(__file__).parent / "resume_worker.py", tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert [consumed for _, consumed in first.values()] == [1, 1]
    assert not (tmp_path / "none-1").exists()


def test_a_restart_by_the_launcher_does_not_undo_a_stop_signal(tmp_path, monkeypatch):
    accelerator = Accelerator(cpu=True)
    record = RunRecord.of(TrainConfig(), "digest", accelerator)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert find_checkpoint(tmp_path, record, accelerator, RunLock(tmp_path)) is None  # of a crash: it begins again
    (tmp_path / REQUEUE_NAME).touch()
    with pytest.raises(StoppedError, match="--max_restarts does not undo"):
        find_checkpoint(tmp_path, record, accelerator, RunLock(tmp_path))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert find_checkpoint(tmp_path, record, accelerator, RunLock(tmp_path)) is None


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    accelerator = Accelerator(cpu=True)
    record = RunRecord.of(TrainConfig(), "digest", accelerator)
    hold = "import fcntl, sys; file = open(sys.argv[1], 'ab'); fcntl.lockf(file, fcntl.LOCK_EX); print(flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", f"{hold}; input()", tmp_path / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(UsageError, match="another process trains in it"):
            find_checkpoint(tmp_path, record, accelerator, RunLock(tmp_path))
        other.kill()
    with RunLock(tmp_path) as lock:
        assert find_checkpoint(tmp_path, record, accelerator, lock) is None
        assert (tmp_path / ".lock").exists()
    assert not list(tmp_path.iterdir())


def test_ranks_need_not_be_on_the_same_device_nor_have_the_same_environment():
    record = RunRecord.of(TrainConfig(), "digest", Accelerator(cpu=True))
    names = record.common_settings().keys()
    assert {"data_digest", "seed", "optim.lr", "mixed_precision", "versions.torch", "versions.python"} <= names
    assert not [name for name in names if name.split(".")[0] in ("tf32", "device", "environment")]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_adam_goes_on_in_the_memory_layout_of_the_weights(layout):
    """A checkpoint has the default layout, and fused Adam reads weight and moments by one index."""

    def start() -> tuple[nn.Module, torch.optim.Adam]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1))
            model.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
        return model, torch.optim.Adam(model.parameters(), lr=0.1, fused=True)

    def step(model: nn.Module, adam: torch.optim.Adam) -> None:
        images = torch.linspace(-1, 1, 2 * 3 * 6 * 6).reshape(2, 3, 6, 6)
        model(images).square().sum().backward()
        adam.step()
        adam.zero_grad()

    whole, again = start(), start()
    step(*whole)
    saved = Snapshot.of(whole[0], whole[0], whole[1])
    assert all(weights.is_contiguous() for weights in saved.weights.values())
    found = Checkpoint(path=RUN, weights=saved.weights, ema=saved.ema, optimizer=saved.optimizer, state={})
    restore_weights(found, again[0], start()[0], again[1])
    for weight in again[0].parameters():
        assert again[1].state[weight]["exp_avg"].stride() == weight.stride()
    step(*whole)
    step(*again)
    for one, other in zip(whole[0].parameters(), again[0].parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_state_is_restored_as_it_was_saved():
    state = TrainState(
        stream={"digest": "abc", "seed": 1, "window": 2, "epoch": 3, "consumed": 4},
        step=5,
        early_stopping=EarlyStopping(patience=9, best=0.5, evals_since_best=6),
        eval_pending=True,
        scaler={"scale": 1024.0},
        config={"seed": 1},
    )
    saved = json.loads(json.dumps(state.to_json()))
    assert TrainState.from_json(saved, patience=9) == state
    saved["since_best"], saved["unjudged"] = saved.pop("evals_since_best"), saved.pop("eval_pending")
    assert TrainState.from_json(saved, patience=9) == state  # of version 0.1


def test_the_optimizer_goes_on_with_the_settings_of_the_config():
    model, ema = nn.Linear(2, 2), nn.Linear(2, 2)
    saved = torch.optim.Adam([{"params": model.parameters(), "weight_decay": 0.5}], lr=1.0)
    model(torch.ones(1, 2)).sum().backward()
    saved.step()
    found = Checkpoint(
        path=RUN, weights=model.state_dict(), ema=ema.state_dict(), optimizer=saved.state_dict(), state={}
    )
    other, other_ema = nn.Linear(2, 2), nn.Linear(2, 2)
    adam = torch.optim.Adam([{"params": other.parameters(), "weight_decay": 0.25}], lr=0.125)
    restore_weights(found, other, other_ema, adam)
    assert (adam.param_groups[0]["lr"], adam.param_groups[0]["weight_decay"]) == (0.125, 0.25)
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(other_ema.weight, ema.weight)
    assert torch.equal(adam.state[other.weight]["exp_avg"], saved.state[model.weight]["exp_avg"])


def test_a_setting_that_an_older_version_did_not_have_was_the_default():
    before = record()
    del before["keep"], before["optim"]["ema_decay"]
    assert changed_settings(before, record(), RUN) == []
    assert changed_settings(before, record(keep=3), RUN) == ["keep 2 -> 3"]


def test_a_best_model_that_a_kill_left_between_two_names_is_there_again(tmp_path):
    accelerator = Accelerator(cpu=True)
    (tmp_path / ".best.old").mkdir()
    find_checkpoint(tmp_path, RunRecord.of(TrainConfig(), "digest", accelerator), accelerator, RunLock(tmp_path))
    assert (tmp_path / "best").is_dir()
