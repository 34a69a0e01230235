"""Inference with trained models: photographs in, lesion probabilities or masks out."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from isicdist.config import Tta
from isicdist.network.best import ModelMetadata, load_best, model_folder
from isicdist.network.normalise import normalise, to_unit
from isicdist.network.seen import SeenImages
from isicdist.network.tta import mean_probs
from shards.geometry import ResizePlan
from shards.inputs.decode import upright_rgb


class InputSpec(NamedTuple):
    """The input that a network was trained on: images resized by `mode` to a square of `size` pixels a side."""

    mode: str
    """stretch, pad or crop."""
    size: int

    def resize_plan(self, height: int, width: int) -> ResizePlan:
        """Plan the resize of a picture of `height` × `width` pixels to this input, and of its prediction back."""
        return ResizePlan.of(self.mode, height, width, self.size)


class Segmenter(nn.Module):
    """A network with all that is needed to use it: input size, resize mode, normalisation and threshold."""

    def __init__(self, network: nn.Module, metadata: ModelMetadata, seen: SeenImages | None = None) -> None:
        """`network` maps normalised images (B, 3, H, W) to logits (B, 1, H, W)."""
        super().__init__()
        self.network = network
        self.metadata = metadata
        """Origin of the model, too: step, validation score, digest of the training data."""
        self.seen = seen
        """The images that it was trained and chosen on; None where an older version did not record them."""
        self.threshold = metadata.threshold
        """Probability above which a pixel is lesion."""
        self.input_spec = InputSpec(metadata.fit, metadata.size)

    def predict(self, picture: Image.Image | np.ndarray, tta: Tta = "off") -> np.ndarray:
        """Segment one photograph: its mask (H, W) bool at its own resolution, True where `threshold` is exceeded.

        Takes what `predict_probs` takes.
        """
        return self.predict_probs(picture, tta) > self.threshold

    @torch.inference_mode()
    def predict_probs(self, picture: Image.Image | np.ndarray, tta: Tta = "off") -> np.ndarray:
        """Predict the lesion probabilities of one photograph, (H, W) float32 in [0, 1], at its own resolution.

        `picture`: a PIL image of any mode, which is turned upright by its EXIF orientation (H and W are those of the
        upright picture), or an array (H, W, 3) uint8 RGB. `tta`: test-time augmentation. Where the resize mode crops
        the picture, the probability outside is 0. Raises TypeError or ValueError for another array.
        """
        image = upright_rgb(picture) if isinstance(picture, Image.Image) else _image_of(picture)
        plan = self.resize_plan(image.height, image.width)
        pixels = torch.tensor(plan.resize_image(image), device=next(self.parameters()).device)  # (size, size, 3)
        probs = self(pixels.permute(2, 0, 1)[None], tta)[0, 0]  # (size, size)
        return plan.restore(probs.cpu().numpy())

    def resize_plan(self, height: int, width: int) -> ResizePlan:
        """Plan the resize of a picture of `height` × `width` pixels to the network's input, and of its mask back."""
        return self.input_spec.resize_plan(height, width)

    def forward(self, images: Tensor, tta: Tta = "off") -> Tensor:
        """Predict lesion probabilities (B, 1, H, W) float32 in [0, 1] of RGB images (B, 3, H, W) uint8, 0 to 255.

        `tta`: test-time augmentation over mirrored and rotated copies. Raises TypeError for images of another type,
        ValueError for a height or width that is not a multiple of 16.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"images of {images.dtype}: give uint8, 0 to 255; the model normalises them itself")
        return mean_probs(self._logits, images, tta)

    def _logits(self, images: Tensor) -> Tensor:
        return self.network(normalise(to_unit(images), self.metadata.mean, self.metadata.std))


def load_model(path: str | Path) -> Segmenter:
    """Load the best model of a run, in evaluation mode and without gradients, on the CPU (`.to(device)` moves it).

    `path`: a run, its `best` folder, or a copy of that. Only safetensors and JSON are read; nothing of them is
    executed. Raises CheckpointError when it is missing, damaged or of another network.

        model = isicdist.load_model("RUN")
        mask = model.predict(Image.open("photograph.jpg"))  # (H, W) bool

    For batches, resize and restore yourself; `restore` takes one (H, W) of the probabilities:

        plan = model.resize_plan(picture.height, picture.width)
        images = torch.tensor(plan.resize_image(picture)).permute(2, 0, 1)[None]  # (1, 3, H, W) uint8
        probs = plan.restore(model(images)[0, 0].numpy())  # at the picture's own resolution
    """
    network, metadata = load_best(path)
    seen = SeenImages.load(model_folder(Path(path)) or Path(path))
    return Segmenter(network, metadata, seen).requires_grad_(False).eval()


def _image_of(pixels: np.ndarray) -> Image.Image:
    if pixels.dtype != np.uint8:
        raise TypeError(f"a picture of {pixels.dtype}: give uint8, 0 to 255")
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"a picture of shape {pixels.shape}: give (H, W, 3), RGB")
    return Image.fromarray(pixels)
