"""Train a skin-lesion segmentation network on many GPUs from WebDataset shards, with a Dice that can be believed."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isicdist.network.segmenter import load_model

__version__ = "0.1.0"
__all__ = ["__version__", "load_model"]


def __getattr__(name: str) -> Any:
    """`load_model`, which brings torch with it, is imported when it is first asked for."""
    if name != "load_model":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from isicdist.network.segmenter import load_model

    return load_model
