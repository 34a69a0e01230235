"""The ONNX file: what goes in and comes out of it, that it is compared, and that a bad one is not written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from isicdist import export, load_model
from isicdist.cli import main
from isicdist.config import ModelConfig
from isicdist.errors import CheckpointError
from isicdist.export import export_onnx
from isicdist.network.best import ModelMetadata, ValidationScore, save_best
from isicdist.network.unet import ImprovedUNet
from shards.errors import UsageError

METADATA = ModelMetadata(
    architecture=ModelConfig(base_channels=2),
    size=48,
    fit="pad",
    mean=(0.7, 0.5, 0.4),
    std=(0.2, 0.1, 0.3),
    threshold=0.375,
    score=ValidationScore(mean_dice=0.75),
    step=9,
    data_digest="0123",
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_best(tmp_path / "run", ImprovedUNet(base_channels=2), METADATA)
    return tmp_path / "run"


def test_the_file_gives_the_models_probabilities_for_any_batch(run, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = tmp_path / "new" / "model.onnx"
    with pytest.raises(SystemExit) as ended:
        main(["export", str(run), "--format", "onnx", "--out", str(out)])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert f"written to {out}\n" in said
    assert f"0 of {export.TEST_IMAGES * 48 * 48} mask pixels differ" in said
    assert [path.name for path in out.parent.iterdir()] == ["model.onnx"]

    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["isicdist"])["threshold"] == 0.375
    model, rng = load_model(run), np.random.default_rng(0)
    for batch in (1, 5):
        images = rng.integers(0, 256, (batch, 3, 48, 48), dtype=np.uint8)
        images[:, :, :12] = 0  # a black border, as the fit leaves it
        (probs,) = session.run(["probabilities"], {"images": images})
        assert probs.dtype == np.float32
        np.testing.assert_allclose(probs, model(torch.from_numpy(images)).numpy(), atol=2e-5, rtol=0)


@pytest.mark.slow
def test_a_file_that_says_something_else_is_not_written(run, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    def bent(model: torch.nn.Module) -> None:
        with torch.no_grad():
            next(model.parameters()).mul_(1.01)

    monkeypatch.setattr(export, "_stage_norms", bent)
    with pytest.raises(CheckpointError, match=r"model.onnx: not written, .* pixels of the masks"):
        export_onnx(run, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_staged_norms_are_the_models_norms(run):
    model = load_model(run)
    images = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = model(images)
    export._stage_norms(model)
    assert not any(isinstance(module, torch.nn.InstanceNorm2d) for module in model.network.children())
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=0)


def test_what_is_missing_is_named(run, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="no such folder"):
        export_onnx(tmp_path / "none", tmp_path / "model.onnx")
    monkeypatch.setattr(export, "PACKAGES", ("json", "onnxnixda"))
    with pytest.raises(UsageError, match=r"needs onnxnixda: pip install 'isicdist\[export\]'"):
        export_onnx(run, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
