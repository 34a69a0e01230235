"""A trained network ready for use: photographs go in as they are, lesion probabilities come out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from isicdist.config import Tta
from isicdist.errors import CheckpointError
from isicdist.network import best
from isicdist.network.normalise import normalise, to_unit
from isicdist.network.tta import mean_probs
from isicdist.network.unet import SIZE_DIVISOR
from shards.geometry import RESIZE_MODES, ResizePlan

if TYPE_CHECKING:
    from accelerate import Accelerator

View = tuple[str, int]
"""How an image is shown to a network: the kind of its fit, and the side of the square in pixels."""


class Segmenter(nn.Module):
    """A network together with what it takes to use it: size, fit, normalisation, and the threshold of its masks."""

    def __init__(self, network: nn.Module, card: dict[str, Any]) -> None:
        """`network` gives logits (B, 1, H, W); `card` is what RUN/best/model.json says.

        Raises KeyError, TypeError or ValueError for a card that lacks something.
        """
        super().__init__()
        self.network = network
        self.card = card
        """All that is known of the model: step, score, digest of the training data, ..."""
        self.threshold = float(card["threshold"])
        """The probability above which a pixel is lesion."""
        self.view: View = (card["fit"], int(card["size"]))
        """The fit and the side that it was trained with."""
        if self.view[0] not in RESIZE_MODES or self.view[1] % SIZE_DIVISOR:
            raise ValueError(f"fit {self.view[0]!r} to {self.view[1]} pixels")
        self._mean, self._std = tuple(card["mean"]), tuple(card["std"])

    def fit(self, height: int, width: int) -> ResizePlan:
        """How a picture of `height` × `width` pixels is brought to the square that the network was trained with."""
        kind, side = self.view
        return ResizePlan.of(kind, height, width, side)

    def forward(self, images: Tensor, tta: Tta = "off") -> Tensor:
        """Lesion probabilities (B, 1, H, W) float32 in [0, 1] of RGB images (B, 3, H, W) uint8, 0 to 255.

        `tta`: which mirrored and turned copies the probabilities are the mean of. Raises TypeError for images of
        another type, ValueError for a height or width that is not a multiple of 16.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"images of {images.dtype}: give uint8, 0 to 255; the model normalises them itself")
        return mean_probs(self._logits, images, tta)

    def _logits(self, images: Tensor) -> Tensor:
        return self.network(normalise(to_unit(images), self._mean, self._std))


def load_model(path: str | Path) -> Segmenter:
    """The best model of a run, in evaluation mode and without gradients, on the CPU (`.to(device)` moves it).

    `path`: a run, its `best` folder, or a copy of that. Only safetensors and JSON are read; nothing of them is
    executed. Raises CheckpointError when it is missing, damaged or of another network.

        model = isicdist.load_model("RUN")
        picture = Image.open("photograph.jpg").convert("RGB")
        fit = model.fit(picture.height, picture.width)
        images = torch.tensor(fit.resize_image(picture)).permute(2, 0, 1)[None]  # (1, 3, H, W) uint8
        probs = fit.restore(model(images)[0, 0].numpy())  # at the picture's own resolution
        mask = probs > model.threshold
    """
    network, card = best.load_model(path)
    try:
        model = Segmenter(network, card)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: {best.METADATA_NAME} does not say what a prediction needs ({error!r})"
        ) from error
    return model.requires_grad_(False).eval()


class Ensemble:
    """One or several segmenters whose probabilities are averaged at the picture's own resolution."""

    def __init__(self, members: Sequence[Segmenter]) -> None:
        """`members`: at least one; each may have another size and fit."""
        self.members = members
        self.views: list[View] = sorted({member.view for member in members}, key=lambda view: -view[1])
        """What an image has to be fitted to, the largest first."""
        self.threshold = sum(member.threshold for member in members) / len(members)
        """The mean of the members' thresholds: the probability above which a pixel is lesion."""

    def prepare(self, accelerator: Accelerator) -> None:
        """Bring the networks to the device and the precision of this process."""
        for member in self.members:
            member.network = accelerator.prepare_model(member.network, evaluation_mode=True)

    def record(self) -> dict[str, Any]:
        """What tells two ensembles apart, as plain values."""
        return {
            "models": sorted(str(member.card["sha256"])[:16] for member in self.members),
            "threshold": self.threshold,
        }

    @torch.inference_mode()
    def probs(
        self, images: Sequence[Mapping[View, np.ndarray]], device: torch.device, tta: Tta
    ) -> list[dict[View, np.ndarray]]:
        """For each of a batch of images, by view: the sum of the probabilities (H, W) float32 of its members.

        `images`: each as every view shows it, (H, W, 3) uint8.
        """
        probs: list[dict[View, np.ndarray]] = [{} for _ in images]
        for view in self.views if images else []:
            batch = torch.from_numpy(np.stack([image[view] for image in images]))
            batch = batch.to(device).permute(0, 3, 1, 2)  # (B, 3, H, W)
            opinions = torch.stack([member(batch, tta) for member in self.members if member.view == view])
            for each, summed in zip(probs, opinions.sum(dim=0)[:, 0].cpu().numpy(), strict=True):
                each[view] = summed
        return probs

    def restored(self, probs: Mapping[View, np.ndarray], fits: Mapping[View, ResizePlan]) -> np.ndarray:
        """The mean probabilities (H, W) float32 of one picture at its own resolution, from each view's sum (H, W).

        Where the fit of a member cut something off, the others decide; where all did, it is 0.
        """
        original = next(iter(fits.values())).original
        total, members = np.zeros(original, np.float32), np.zeros(original, np.float32)
        for view, fit in fits.items():
            left, top, right, bottom = fit.source
            total += fit.restore(probs[view])
            members[top:bottom, left:right] += sum(member.view == view for member in self.members)
        return total / np.maximum(members, 1)
