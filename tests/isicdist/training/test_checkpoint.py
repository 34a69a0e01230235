"""Checkpoints: whole or not there, verified, never unpickled."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import resource
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from isicdist.errors import CheckpointError
from isicdist.network.unet import ImprovedUNet
from isicdist.training import checkpoint
from isicdist.training.checkpoint import EMA, MANIFEST, MODEL, OPTIMIZER, STATE

ARCHITECTURE: dict[str, Any] = {"base_channels": 2, "dropout": 0.0}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def trained(seed: int = 0) -> tuple[ImprovedUNet, torch.optim.Adam]:
    """A small network after one step of Adam."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ImprovedUNet(**ARCHITECTURE)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    optimizer.step()
    return model, optimizer


def save(run: Path, *steps: int, keep: int = 9) -> None:
    for step in steps:
        model, optimizer = trained(step)
        snapshot = checkpoint.Snapshot.of(model, trained(step + 1)[0], optimizer)
        checkpoint.save(run, snapshot, {"step": step, "best": 0.5, "stream": {"epoch": step}}, keep=keep)


def newest(run: Path) -> tuple[checkpoint.Checkpoint | None, list[str]]:
    warnings: list[str] = []
    return checkpoint.newest(run, warnings.append), warnings


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_what_was_saved_is_what_is_loaded(tmp_path):
    save(tmp_path, 3, 12)
    found, warnings = newest(tmp_path)
    assert found is not None
    assert not warnings
    assert found.path.name == "step-00000012"
    assert found.state == {"step": 12, "best": 0.5, "stream": {"epoch": 12}}
    model, optimizer = trained(12)
    other, other_optimizer = trained(1)
    other.load_state_dict(found.weights)
    other_optimizer.load_state_dict(found.optimizer)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        for name, value in optimizer.state[one].items():
            assert torch.equal(value, other_optimizer.state[two][name])
    other.load_state_dict(found.ema)
    for one, two in zip(trained(13)[0].parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_run_without_a_checkpoint_has_none(tmp_path):
    assert newest(tmp_path) == (None, [])


def test_only_the_newest_are_kept(tmp_path):
    save(tmp_path, 1, 2, 9, 10, keep=2)
    assert names(tmp_path) == ["step-00000009", "step-00000010"]


def test_a_damaged_checkpoint_takes_the_place_of_no_good_one(tmp_path):
    save(tmp_path, 1, 2, 10)
    flip(tmp_path / "checkpoints" / "step-00000010" / MODEL)
    save(tmp_path, 4, 6, keep=1)
    assert names(tmp_path) == ["step-00000006", "step-00000010"]
    save(tmp_path, 12, keep=1)
    assert names(tmp_path) == ["step-00000012"]


@pytest.mark.parametrize("name", [MODEL, EMA, OPTIMIZER, STATE, MANIFEST])
def test_a_damaged_file_is_named_and_passed_over(tmp_path, name):
    save(tmp_path, 1, 2)
    flip(tmp_path / "checkpoints" / "step-00000002" / name)
    found, warnings = newest(tmp_path)
    assert found is not None
    assert found.path.name == "step-00000001"
    assert len(warnings) == 1
    assert "step-00000002" in warnings[0]
    assert name in warnings[0] or name == MANIFEST


@pytest.mark.parametrize("name", [MODEL, EMA, OPTIMIZER, STATE, MANIFEST])
def test_a_missing_file_is_named(tmp_path, name):
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "step-00000001" / name).unlink()
    with pytest.raises(CheckpointError, match=f"step-00000001.*{name}"):
        checkpoint.load(tmp_path / "checkpoints" / "step-00000001")


@pytest.mark.parametrize("manifest", [{}, {MODEL: None}, []])
def test_a_manifest_must_vouch_for_every_file(tmp_path, manifest):
    save(tmp_path, 1)
    path = tmp_path / "checkpoints" / "step-00000001"
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="step-00000001"):
        checkpoint.load(path)


def test_a_kill_inside_a_save_changes_nothing(tmp_path):
    save(tmp_path, 1, 2)
    half = tmp_path / "checkpoints" / ".step-00000003.new"
    half.mkdir()
    (half / MODEL).write_bytes(b"half of it")
    found, warnings = newest(tmp_path)
    assert found is not None
    assert found.path.name == "step-00000002"
    assert not warnings
    save(tmp_path, 4)
    found, _ = newest(tmp_path)
    assert found is not None
    assert found.path.name == "step-00000004"
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000004"]  # and no half of the third


@pytest.mark.parametrize("share", [0.5, 1.5])  # of the weights: a full disk in the first file, or in a later one
def test_a_save_on_a_full_disk_is_one_line_and_leaves_the_one_before(tmp_path, share):
    """Python ignores the signal of the limit, so that a write beyond it fails as on a full disk."""
    save(tmp_path, 1)
    weights = (tmp_path / "checkpoints" / "step-00000001" / MODEL).stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * weights), before[1]))
    try:
        with pytest.raises(CheckpointError, match="step-00000002: not written") as caught:
            save(tmp_path, 2, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["step-00000001"]
    found, warnings = newest(tmp_path)
    assert found is not None
    assert not warnings


def test_when_all_are_damaged_nothing_begins_anew(tmp_path):
    save(tmp_path, 1, 2)
    for name in names(tmp_path):
        flip(tmp_path / "checkpoints" / name / MODEL)
    with pytest.raises(CheckpointError, match=r"step-00000001.*it is the last one: begin again with another --run"):
        newest(tmp_path)


class Bomb:
    """Unpickled, it touches a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("pack", ["pickle", "torch"])
def test_nothing_is_unpickled(tmp_path, pack):
    """A checkpoint made to harm: its manifest is right, and its optimizer would run code."""
    target = tmp_path / "touched"
    packed = io.BytesIO(pickle.dumps(Bomb(target), protocol=2))
    if pack == "torch":
        packed = io.BytesIO()
        torch.save({"state": Bomb(target)}, packed)
    save(tmp_path, 1)
    path = tmp_path / "checkpoints" / "step-00000001"
    (path / OPTIMIZER).write_bytes(packed.getvalue())
    manifest = json.loads((path / MANIFEST).read_text())
    manifest[OPTIMIZER] = hashlib.sha256(packed.getvalue()).hexdigest()
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=OPTIMIZER) as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)
    assert not target.exists()


def test_a_snapshot_is_not_what_training_goes_on_with():
    model, optimizer = trained()
    snapshot = checkpoint.Snapshot.of(model, model, optimizer)
    before = model.stem.weight.detach().clone()
    with torch.no_grad():
        model.stem.weight.zero_()
        optimizer.state[model.stem.weight]["exp_avg"].fill_(9)
    assert torch.equal(snapshot.weights["stem.weight"], before)
    assert not any((state["exp_avg"] == 9).all() for state in snapshot.optimizer["state"].values())


def test_what_the_writer_could_not_write_is_raised_at_the_next_write_or_the_end():
    def full(_: object = None) -> None:
        raise CheckpointError("the disk is full")

    done: list[int] = []
    writer = checkpoint.BackgroundWriter()
    writer.submit(done.append, 1)
    writer.submit(full)
    with pytest.raises(CheckpointError, match="full"):
        writer.submit(done.append, 2)
    assert done == [1]
    with pytest.raises(CheckpointError, match="full"), checkpoint.BackgroundWriter() as writer:
        writer.submit(full)
    writer = checkpoint.BackgroundWriter()
    writer.submit(full)
    writer.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)  # the error that ended the run is the one shown


def test_a_write_that_has_begun_is_finished_though_an_error_ends_the_run():
    begun, done = threading.Event(), []

    def slow() -> None:
        begun.set()
        time.sleep(0.2)
        done.append(1)

    writer = checkpoint.BackgroundWriter()
    writer.submit(slow)
    assert begun.wait(20)
    writer.__exit__(KeyError, KeyError(), None)
    assert done == [1]
