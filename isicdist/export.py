"""Export of a trained model to ONNX, verified against the torch model with onnxruntime."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from isicdist.data import synthetic
from isicdist.errors import CheckpointError
from isicdist.network.ensemble import Ensemble, load_ensemble
from shards.errors import UsageError
from shards.files import atomic_file

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
MAX_DIFFERENCE = 1e-4
"""Maximum absolute difference of a probability between onnxruntime and torch."""
TEST_IMAGES = 4
"""Number of synthetic photographs that they are compared on."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Agreement of onnxruntime with torch on the same images."""

    images: int
    pixels: int
    """Pixels of all images."""
    max_difference: float
    """Maximum absolute difference of a probability."""
    differing_pixels: int
    """Pixels whose mask differs at the model's threshold."""


def export_onnx(checkpoint: Path | Sequence[Path], out: Path) -> Comparison:
    """Export the best model of a run, or an ensemble, to ONNX, and check that onnxruntime gives the same masks.

    `checkpoint`: what `isicdist evaluate` takes. The models of an ensemble take one input; their mean is in the graph.
    Input `images`: uint8 (batch, 3, size, size), RGB, resized as in training; the normalisation is part of the graph.
    Output `probabilities`: float32 (batch, 1, size, size) in [0, 1]. The batch size is dynamic. The file's metadata
    has the model's as JSON under `isicdist`: size, fit, threshold and the rest of `ModelMetadata`, which an ensemble
    has for each of its `members`.
    Raises UsageError without the packages, CheckpointError for a model that cannot be loaded, and where the two
    differ; then no file is written.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"the export needs {', '.join(missing)}: pip install 'isicdist[export]'")
    model = load_ensemble([checkpoint] if isinstance(checkpoint, Path) else checkpoint)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(out) as temporary:
        _convert(model, temporary)
        comparison = _compare(model, temporary)
        if comparison.max_difference > MAX_DIFFERENCE or comparison.differing_pixels:
            raise CheckpointError(
                f"{out}: not written, as onnxruntime is not torch: probabilities differ by up to "
                f"{comparison.max_difference:.1e}, and {comparison.differing_pixels} of {comparison.pixels} "
                "pixels of the masks"
            )
    return comparison


def _convert(model: Ensemble, path: Path) -> None:
    """Write `model` as ONNX, with its metadata."""
    model = copy.deepcopy(model)
    _stage_norms(model)
    size = model.input_spec.size
    images = torch.zeros((2, 3, size, size), dtype=torch.uint8)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns about torchvision, which is not needed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # raised inside torch
        program = torch.onnx.export(
            model,
            (images,),
            input_names=["images"],
            output_names=["probabilities"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # only the old exporter returns None
    program.model.metadata_props["isicdist"] = json.dumps(model.to_json())
    program.save(path)


class _StagedNorm(nn.Module):
    """Instance norm that sums over each row first, then over the rows.

    onnxruntime's own sums a whole channel sequentially in float32: on padded images its probabilities differed by
    1.4e-4 at 256 pixels. In two stages they differ by less than 2e-6, in the same time.
    """

    def __init__(self, norm: nn.InstanceNorm2d) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each channel of each image: (B, C, H, W) -> (B, C, H, W)."""
        centred = x - _staged_mean(x)
        scale = torch.rsqrt(_staged_mean(centred * centred) + self.norm.eps) * self.norm.weight.view(1, -1, 1, 1)
        return centred * scale + self.norm.bias.view(1, -1, 1, 1)


def _staged_mean(x: Tensor) -> Tensor:
    """Average over the pixels in two stages: (B, C, H, W) -> (B, C, 1, 1)."""
    return x.mean(dim=3, keepdim=True).mean(dim=2, keepdim=True)


def _stage_norms(module: nn.Module) -> None:
    """Replace each instance norm in `module` by a `_StagedNorm`, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.InstanceNorm2d):
            setattr(module, name, _StagedNorm(child))
        else:
            _stage_norms(child)


def _compare(model: Ensemble, path: Path) -> Comparison:
    """Run the ONNX file and `model` on the same synthetic photographs."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images = np.stack([_photograph(model, index) for index in range(TEST_IMAGES)])  # (B, 3, H, W)
    expected = model(torch.from_numpy(images)).numpy()
    # In batches of two sizes, to check that the batch size is dynamic.
    found = np.concatenate([np.asarray(session.run(None, {"images": part})[0]) for part in (images[:1], images[1:])])
    return Comparison(
        images=len(images),
        pixels=expected.size,
        max_difference=float(np.abs(found - expected).max()),
        differing_pixels=int(np.count_nonzero((found > model.threshold) != (expected > model.threshold))),
    )


def _photograph(model: Ensemble, index: int) -> np.ndarray:
    """Draw a synthetic photograph, resized to the model's input: (3, H, W) uint8."""
    pixels, _ = synthetic.photograph(0, index)
    return model.input_spec.resize_plan(*pixels.shape[:2]).resize_image(Image.fromarray(pixels)).transpose(2, 0, 1)
