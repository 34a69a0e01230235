"""A trained model for programs without torch: an ONNX file, compared with the model that it was made from."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from isicdist.data import synthetic
from isicdist.errors import CheckpointError
from isicdist.network.segmenter import Segmenter, load_model
from shards.errors import UsageError
from shards.files import atomic_file

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4
"""Largest difference of a probability from the model's own."""
CHECKED = 4
"""Generated photographs that the comparison is made on."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How far onnxruntime is from torch on the same images."""

    images: int
    pixels: int
    """Of all the images together."""
    largest: float
    """Largest difference of a probability."""
    flipped: int
    """Pixels that are lesion to one of them only."""


def export_onnx(checkpoint: Path, out: Path) -> Comparison:
    """Write the best model of a run as ONNX, once onnxruntime is seen to give the same masks.

    Input `images`: uint8 (batch, 3, size, size), RGB, fitted as in training; the normalisation is inside. Output
    `probabilities`: float32 (batch, 1, size, size). The batch is of any size. The file's metadata has the model's
    card as JSON under `isicdist`: size, fit, threshold.
    Raises UsageError without the packages, CheckpointError for the model, or where the two differ.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"the export needs {', '.join(missing)}: pip install 'isicdist[export]'")
    model = load_model(checkpoint)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(out) as temporary:
        _convert(model, temporary)
        comparison = _compare(model, temporary)
        if comparison.largest > TOLERANCE or comparison.flipped:
            raise CheckpointError(
                f"{out}: not written, as onnxruntime is not torch: probabilities differ by up to "
                f"{comparison.largest:.1e}, and {comparison.flipped} of {comparison.pixels} pixels of the masks"
            )
    return comparison


def _convert(model: Segmenter, path: Path) -> None:
    model = copy.deepcopy(model)
    _stage_norms(model)
    size = model.input_spec.size
    images = torch.zeros((2, 3, size, size), dtype=torch.uint8)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of torchvision, which we do without
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch about itself
        program = torch.onnx.export(
            model,
            (images,),
            input_names=["images"],
            output_names=["probabilities"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # it is None for the old exporter only
    program.model.metadata_props["isicdist"] = json.dumps(model.metadata.to_json())
    program.save(path)


class _StagedNorm(nn.Module):
    """Instance norm whose means are taken over each row first, then over the rows.

    onnxruntime's own adds up a whole channel one float after the other: where the fit has left black borders, its
    probabilities were out by 1.4e-4 at 256 pixels. In two stages they are within 2e-6, in the same time.
    """

    def __init__(self, norm: nn.InstanceNorm2d) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        centred = x - _staged_mean(x)
        scale = torch.rsqrt(_staged_mean(centred * centred) + self.norm.eps) * self.norm.weight.view(1, -1, 1, 1)
        return centred * scale + self.norm.bias.view(1, -1, 1, 1)


def _staged_mean(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, 1, 1)."""
    return x.mean(dim=3, keepdim=True).mean(dim=2, keepdim=True)


def _stage_norms(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.InstanceNorm2d):
            setattr(module, name, _StagedNorm(child))
        else:
            _stage_norms(child)


def _compare(model: Segmenter, path: Path) -> Comparison:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images = np.stack([_photograph(model, number) for number in range(CHECKED)])  # (B, 3, H, W)
    expected = model(torch.from_numpy(images)).numpy()
    # One image alone and the others together: the size of the batch is not built in.
    found = np.concatenate([np.asarray(session.run(None, {"images": part})[0]) for part in (images[:1], images[1:])])
    return Comparison(
        images=len(images),
        pixels=expected.size,
        largest=float(np.abs(found - expected).max()),
        flipped=int(np.count_nonzero((found > model.threshold) != (expected > model.threshold))),
    )


def _photograph(model: Segmenter, number: int) -> np.ndarray:
    """A generated photograph as the model sees it, (3, H, W) uint8."""
    pixels, _ = synthetic.photograph(0, number)
    return model.resize_plan(*pixels.shape[:2]).resize_image(Image.fromarray(pixels)).transpose(2, 0, 1)
