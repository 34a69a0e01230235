"""Train a skin-lesion segmentation network on many GPUs from WebDataset shards, with a Dice that can be believed.

    import isicdist
    from PIL import Image

    model = isicdist.load_model("RUN")
    mask = model.predict(Image.open("photograph.jpg"))  # (H, W) bool

A training loop of your own reads a set of the package `shards`, of which each rank gets its samples:

    plan = isicdist.BatchPlan(global_size=32, micro_size=4, world_size=8)
    with isicdist.Stream(shards.ShardSet.open("DIR").split("train"), plan, rank, device="cuda") as stream:
        for step in stream.steps():  # optimizer steps of one epoch
            for batch in step:  # gradient accumulation

The commands are functions too: `isicdist.train.train`, `isicdist.evaluate.evaluate`, `isicdist.predict.predict`. The
names of `__all__` are imported when they are first used, so that `import isicdist` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isicdist.config import TrainConfig
    from isicdist.data.order import BatchPlan
    from isicdist.data.planned_source import PlannedSource
    from isicdist.data.stream import Stream
    from isicdist.errors import CheckpointError, StoppedError, TrainingError
    from isicdist.metrics.dice import DiceReduction, DiceSummary
    from isicdist.network.best import ModelMetadata
    from isicdist.network.segmenter import Segmenter, load_model
    from isicdist.network.unet import ImprovedUNet

__version__ = "0.2.0.dev0"
__all__ = [
    "BatchPlan",
    "CheckpointError",
    "DiceReduction",
    "DiceSummary",
    "ImprovedUNet",
    "ModelMetadata",
    "PlannedSource",
    "Segmenter",
    "StoppedError",
    "Stream",
    "TrainConfig",
    "TrainingError",
    "__version__",
    "load_model",
]

_MODULES = {
    "BatchPlan": "isicdist.data.order",
    "CheckpointError": "isicdist.errors",
    "DiceReduction": "isicdist.metrics.dice",
    "DiceSummary": "isicdist.metrics.dice",
    "ImprovedUNet": "isicdist.network.unet",
    "ModelMetadata": "isicdist.network.best",
    "PlannedSource": "isicdist.data.planned_source",
    "Segmenter": "isicdist.network.segmenter",
    "StoppedError": "isicdist.errors",
    "Stream": "isicdist.data.stream",
    "TrainConfig": "isicdist.config",
    "TrainingError": "isicdist.errors",
    "load_model": "isicdist.network.segmenter",
}
"""The module of each public name."""


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
