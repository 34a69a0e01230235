"""Ensembles of trained models, such as the models of all folds of a cross-validation: probabilities are averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from isicdist.config import Fold, Tta
from isicdist.errors import CheckpointError
from isicdist.network.best import is_model, load_metadata, model_folder
from isicdist.network.segmenter import InputSpec, Segmenter, load_model
from shards.geometry import ResizePlan

if TYPE_CHECKING:
    from accelerate import Accelerator


class Ensemble(nn.Module):
    """One or more segmenters whose probabilities are averaged."""

    def __init__(self, members: Sequence[Segmenter], names: Sequence[str] = ()) -> None:
        """`members`: at least one; each may have another input size and resize mode. `names`: of their runs."""
        super().__init__()
        self._modules_of_members = nn.ModuleList(members)  # registers them
        self.members = tuple(members)
        self.names = tuple(names)
        self.input_specs = sorted({member.input_spec for member in members}, key=lambda spec: (-spec.size, spec.mode))
        """The inputs that a picture must be resized to, the largest first."""
        self.threshold = sum(member.threshold for member in members) / len(members)
        """Mean of the members' thresholds: the probability above which a pixel is lesion."""

    @property
    def input_spec(self) -> InputSpec:
        """The input that all members take. Raises CheckpointError where they differ."""
        if len(self.input_specs) > 1:
            inputs = ", ".join(f"{spec.mode} to {spec.size} pixels" for spec in self.input_specs)
            raise CheckpointError(f"the models of the ensemble take different inputs ({inputs}); give models of one")
        return self.input_specs[0]

    def forward(self, images: Tensor, tta: Tta = "off") -> Tensor:
        """Predict lesion probabilities (B, 1, H, W) float32 in [0, 1] of RGB images (B, 3, H, W) uint8, 0 to 255.

        `tta`: test-time augmentation over mirrored and rotated copies. Raises what `Segmenter.forward` raises.
        """
        first, *others = self.members
        probs = first(images, tta)
        for member in others:
            probs = probs + member(images, tta)
        return probs / len(self.members)

    def prepare(self, accelerator: Accelerator) -> None:
        """Move the networks to the device and the precision of this process."""
        for member in self.members:
            member.network = accelerator.prepare_model(member.network, evaluation_mode=True)

    def to_json(self) -> dict[str, Any]:
        """Describe the ensemble for programs without torch: of one model its `ModelMetadata`, else what all share.

        Raises CheckpointError where the members take different inputs.
        """
        members = [member.metadata.to_json() for member in self.members]
        if len(members) == 1:
            return members[0]
        mode, size = self.input_spec
        return {"size": size, "fit": mode, "threshold": self.threshold, "members": members}

    def identity(self) -> dict[str, Any]:
        """Give what distinguishes this ensemble from others, as plain values for a JSON file."""
        return {
            "models": sorted(member.metadata.sha256[:16] for member in self.members),
            "threshold": self.threshold,
        }

    @torch.inference_mode()
    def sum_probs(
        self, images: Sequence[Mapping[InputSpec, np.ndarray]], device: torch.device, tta: Tta
    ) -> list[dict[InputSpec, np.ndarray]]:
        """Predict a batch: for each picture, by input, the sum of the probabilities (H, W) float32 of its members.

        `images`: each picture resized to every one of `input_specs`, (H, W, 3) uint8.
        """
        sums: list[dict[InputSpec, np.ndarray]] = [{} for _ in images]
        for spec in self.input_specs if images else []:
            batch = torch.from_numpy(np.stack([image[spec] for image in images])).to(device)  # (B, H, W, 3)
            batch = batch.permute(0, 3, 1, 2)  # (B, 3, H, W)
            probs = torch.stack([member(batch, tta) for member in self.members if member.input_spec == spec])
            for by_spec, summed in zip(sums, probs.sum(dim=0)[:, 0].cpu().numpy(), strict=True):
                by_spec[spec] = summed
        return sums

    def restore_mean(self, sums: Mapping[InputSpec, np.ndarray], plans: Mapping[InputSpec, ResizePlan]) -> np.ndarray:
        """Average the members' probabilities of one picture at its own resolution, (H, W) float32.

        `sums`: of `sum_probs`, by input, (size, size). Where the resize mode of some members crops the picture, the
        mean is over the others; where all do, it is 0.
        """
        original = next(iter(plans.values())).original
        total, members = np.zeros(original, np.float32), np.zeros(original, np.float32)
        for spec, plan in plans.items():
            left, top, right, bottom = plan.source
            total += plan.restore(sums[spec])
            members[top:bottom, left:right] += sum(member.input_spec == spec for member in self.members)
        return total / np.maximum(members, 1)


def load_ensemble(paths: Sequence[Path]) -> Ensemble:
    """Load the best models of several runs, as `load_model` loads one.

    The folder of a cross-validation (`isicdist crossval --run RUNS`) stands for the runs of all its folds. Raises
    CheckpointError for a model that is missing, damaged or given twice, and where a fold has none yet.
    """
    runs = [run for path in paths for run in _runs_in(path)]
    parents = {run.parent for run in runs}
    names = [run.name if len(parents) == 1 else str(run) for run in runs]
    folders = [(model_folder(run) or run).resolve() for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        if folders.count(folder) > 1:
            raise CheckpointError(f"{run}: given twice, so that it would count double in the mean; give it once")
    return Ensemble([load_model(run) for run in runs], names).requires_grad_(False).eval()


def _runs_in(path: Path) -> list[Path]:
    """List the run itself, or the runs of all folds of a cross-validation."""
    trained = [run for run in sorted(path.glob("fold-*")) if is_model(run)]
    if is_model(path) or not trained:
        return [path]
    held_out = load_metadata(trained[0]).score.split
    fold = Fold.of_split(held_out)
    if fold is None:
        raise CheckpointError(f"{trained[0]}: validated on {held_out}, not on a fold; name the runs one by one")
    runs: list[Path] = []
    for each in fold.all:
        run = path / each.run_name
        if not is_model(run):
            raise CheckpointError(f"{run}: fold {each} has no model yet; go on with isicdist crossval --run {path}")
        if load_metadata(run).score.split != each.name:
            raise CheckpointError(f"{run}: not of fold {each}, as the other runs are; name the runs one by one")
        runs.append(run)
    return runs
