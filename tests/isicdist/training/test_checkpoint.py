"""Checkpoints: whole or not there, verified, never unpickled."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from isicdist.errors import CheckpointError
from isicdist.network import best as best_model
from isicdist.network.best import METADATA_NAME
from isicdist.network.unet import ImprovedUNet
from isicdist.training import checkpoint
from isicdist.training.checkpoint import EMA, MANIFEST, MODEL, OPTIMIZER, STATE
from shards.files import recover_folder

ARCHITECTURE = {"base_channels": 2, "dropout": 0.0}


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
        checkpoint.save(
            run, step, model, trained(step + 1)[0], optimizer, {"best": 0.5, "stream": {"epoch": step}}, keep=keep
        )


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
    save(tmp_path, 1, 2, 10, 9, keep=2)
    assert names(tmp_path) == ["step-00000009", "step-00000010"]


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


@pytest.fixture
def best(tmp_path: Path) -> Path:
    """A run with a best model."""
    model, _ = trained()
    best_model.save_best(tmp_path / "run", model, {"architecture": ARCHITECTURE, "size": 32, "threshold": 0.5})
    return tmp_path / "run"


def test_a_model_is_loaded_from_its_run_its_folder_or_a_copy(best, tmp_path):
    shutil.copytree(best / "best", tmp_path / "copy")
    images = torch.randn((1, 3, 32, 32), generator=torch.Generator().manual_seed(1))
    expected = trained()[0].eval()(images)
    for path in (best, best / "best", tmp_path / "copy"):
        model, card = best_model.load_model(path)
        assert not model.training
        assert torch.equal(model(images), expected)
        assert (card["size"], card["threshold"]) == (32, 0.5)


def test_a_better_model_takes_the_place_of_the_best(best):
    best_model.save_best(best, trained(5)[0], {"architecture": ARCHITECTURE, "size": 48})
    model, card = best_model.load_model(best)
    assert card["size"] == 48
    for one, two in zip(model.parameters(), trained(5)[0].parameters(), strict=True):
        assert torch.equal(one, two)
    assert [path.name for path in best.iterdir()] == ["best"]


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ({"architecture": {"base_channels": 4}}, "another network"),
        ({"architecture": {"base_channels": 2, "deep_supervision": False}}, "another network"),
        ({"architecture": {"channels": 2}}, "channels"),
        ({"architecture": None}, "not a model"),
        ({"sha256": "0"}, "damaged"),
    ],
)
def test_a_card_of_another_network_is_refused_in_one_line(best, card, said):
    path = best / "best" / METADATA_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **card}))
    with pytest.raises(CheckpointError, match=said) as caught:
        best_model.load_model(best)
    assert str(best) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_damaged_or_missing_models_are_named_in_one_line(best, tmp_path):
    flip(best / "best" / MODEL)
    cases = {best: "damaged", tmp_path / "none": "there is no such folder", tmp_path: "no best model yet"}
    for path, said in cases.items():
        with pytest.raises(CheckpointError, match=said) as caught:
            best_model.load_model(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    (best / "best" / MODEL).unlink()
    with pytest.raises(CheckpointError, match=MODEL):
        best_model.load_model(best)


def test_what_is_saved_is_a_whole_network(best):
    model, _ = best_model.load_model(best)
    assert isinstance(model, nn.Module)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in trained()[0].parameters())


def test_a_kill_between_the_two_renames_of_best_is_undone(tmp_path):
    (tmp_path / ".best.old").mkdir()
    (tmp_path / ".best.old" / "model.json").write_text("{}")
    recover_folder(tmp_path / "best")
    assert (tmp_path / "best" / "model.json").read_text() == "{}"
    (tmp_path / ".best.old").mkdir()  # left over, but the new one stands
    recover_folder(tmp_path / "best")
    assert (tmp_path / "best" / "model.json").exists()
