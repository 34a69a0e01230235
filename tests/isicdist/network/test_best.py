"""RUN/best: what is saved is loaded, and everything else is refused in one line."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from isicdist.config import ModelConfig
from isicdist.errors import CheckpointError
from isicdist.network.best import CHECKSUM, METADATA_NAME, MODEL, ModelMetadata, ValidationScore, load_best, save_best
from isicdist.network.unet import ImprovedUNet
from isicdist.network.weights import file_sha256
from shards.files import recover_folder
from shards.reader import ShardSet

METADATA = ModelMetadata(
    architecture=ModelConfig(base_channels=2, dropout=0.0),
    size=32,
    fit="crop",
    threshold=0.375,
    score=ValidationScore(mean_dice=0.75),
    step=9,
    data_digest="0123",
)


def network(seed: int = 0) -> ImprovedUNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ImprovedUNet(base_channels=2, dropout=0.0)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a best model."""
    save_best(tmp_path / "run", network(), METADATA)
    return tmp_path / "run"


def test_a_model_is_loaded_from_its_run_its_folder_or_a_copy(run, tmp_path):
    shutil.copytree(run / "best", tmp_path / "copy")
    images = torch.randn((1, 3, 32, 32), generator=torch.Generator().manual_seed(1))
    expected = network().eval()(images)
    for path in (run, run / "best", tmp_path / "copy"):
        model, metadata = load_best(path)
        assert not model.training
        assert torch.equal(model(images), expected)
        assert metadata == dataclasses.replace(METADATA, sha256=file_sha256(tmp_path / "copy" / MODEL))


def test_a_better_model_replaces_the_best(run):
    save_best(run, network(5), dataclasses.replace(METADATA, size=48))
    model, metadata = load_best(run)
    assert metadata.size == 48
    for one, two in zip(model.parameters(), network(5).parameters(), strict=True):
        assert torch.equal(one, two)
    assert [path.name for path in run.iterdir()] == ["best"]


def test_metadata_of_a_training_run_name_its_shard_set(shard_set):
    shards = ShardSet.open(shard_set)
    metadata = ModelMetadata.of(ModelConfig(), shards, step=3, score=ValidationScore(mean_dice=0.5), threshold=0.25)
    assert (metadata.size, metadata.fit, metadata.data_digest) == (64, "stretch", shards.digest)
    assert (metadata.step, metadata.threshold) == (3, 0.25)
    assert ModelMetadata.from_json(json.loads(json.dumps(metadata.to_json()))) == metadata


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architecture": {"base_channels": 4}}, "another network"),
        ({"architecture": {"base_channels": 2, "deep_supervision": False}}, "another network"),
        ({"architecture": {"base_channels": 0}}, "base_channels is 0"),
        ({"architecture": {"channels": 2}}, "channels"),
        ({"architecture": None}, "missing or damaged"),
        ({"sha256": "0"}, "damaged"),
        ({"threshold": None}, "float"),
        ({"fit": "squeeze"}, "squeeze"),
        ({"size": 40}, "40 pixels"),
        ({"mean": None}, "NoneType"),
        ({"mean": [0.5]}, "each needs 3 numbers"),
        ({"std": ...}, "std"),
        ({"std": [0.2, 0.2, 0]}, "std above 0"),
        ({"mean": [0.5, 0.5, float("nan")]}, "must be finite"),
        ({"threshold": 1.5}, "from 0 to 1"),
        ({"size": 16384}, "16384 pixels"),
        ({"temperature": 2}, "unknown key 'temperature'"),
    ],
)
def test_metadata_that_do_not_describe_the_weights_are_refused_in_one_line(run, change, said):
    path = run / "best" / METADATA_NAME
    changed = {**json.loads(path.read_text()), CHECKSUM: ..., **change}
    path.write_text(json.dumps({name: value for name, value in changed.items() if value is not ...}))
    with pytest.raises(CheckpointError, match=said) as caught:
        load_best(run)
    assert str(run) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_damaged_or_missing_models_are_named_in_one_line(run, tmp_path):
    flip(run / "best" / MODEL)
    cases = {run: "damaged", tmp_path / "none": "there is no such folder", tmp_path: "no best model yet"}
    for path, said in cases.items():
        with pytest.raises(CheckpointError, match=said) as caught:
            load_best(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    (run / "best" / MODEL).unlink()
    with pytest.raises(CheckpointError, match=MODEL):
        load_best(run)
    (run / "best" / METADATA_NAME).write_text("{")
    with pytest.raises(CheckpointError, match=METADATA_NAME):
        load_best(run)


def test_a_kill_between_the_two_renames_of_best_is_undone(tmp_path):
    (tmp_path / ".best.old").mkdir()
    (tmp_path / ".best.old" / "model.json").write_text("{}")
    recover_folder(tmp_path / "best")
    assert (tmp_path / "best" / "model.json").read_text() == "{}"
    (tmp_path / ".best.old").mkdir()  # left over, but the new one stands
    recover_folder(tmp_path / "best")
    assert (tmp_path / "best" / "model.json").exists()


def test_metadata_that_were_changed_by_hand_are_refused_and_their_order_does_not_matter(run):
    path = run / "best" / METADATA_NAME
    value = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(value.items()))))
    assert load_best(run)[1].threshold == 0.375
    path.write_text(json.dumps({**value, "threshold": 0.5}))
    with pytest.raises(CheckpointError, match=r"model\.json: damaged, or changed by hand"):
        load_best(run)
