"""RUN/best: the best model of a run in two files that hold all a prediction needs, and nothing else.

RUN/best/model.safetensors       the weights
RUN/best/model.json              architecture, size, resize mode, normalisation, threshold, score, data digest
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from isicdist.errors import CheckpointError
from isicdist.network.unet import ImprovedUNet
from isicdist.network.weights import checkpoint_folder, file_sha256, load_weights, save_weights

MODEL, METADATA_NAME = "model.safetensors", "model.json"


def save_best(run: Path, model: nn.Module, card: dict[str, Any]) -> None:
    """Publish RUN/best: the weights and `card`, which says everything that using them needs (see `load_model`)."""
    with checkpoint_folder(run / "best") as folder:
        save_weights(model, folder / MODEL)
        (folder / METADATA_NAME).write_text(json.dumps({**card, "sha256": file_sha256(folder / MODEL)}, indent=1))


def load_model(path: str | Path) -> tuple[ImprovedUNet, dict[str, Any]]:
    """The network in evaluation mode, and its card, from a run, its `best` folder, or a copy of that.

    The card holds architecture, size, fit, mean, std, threshold, score and data digest.
    Raises CheckpointError when it is missing, damaged or of another network.
    """
    path = Path(path)
    folder = path if (path / METADATA_NAME).is_file() else path / "best"
    if not (folder / METADATA_NAME).is_file():
        what = "it has no best model yet; train it first" if path.is_dir() else "there is no such folder"
        raise CheckpointError(f"{path}: {what} (wanted: a run folder with best/, or such a folder)")
    try:
        card = json.loads((folder / METADATA_NAME).read_text())
        if file_sha256(folder / MODEL) != card["sha256"]:
            raise CheckpointError(f"{folder / MODEL}: damaged (its sha256 is not the one in {METADATA_NAME})")
        model = ImprovedUNet(**card["architecture"])
        weights = load_weights(folder / MODEL)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: not a model of this isicdist ({error})") from error
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # its message has a line for every weight
        raise CheckpointError(
            f"{folder}: the weights are of another network than {METADATA_NAME} describes; copy the whole folder again"
        ) from error
    return model.eval(), card
