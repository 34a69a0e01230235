"""Pack images and masks into WebDataset tar shards, and read any of their samples by index.

    from shards import BuildOptions, ShardSet, build, verify

    build.build("images.zip", "masks.zip", "set", BuildOptions(size=256))
    assert not verify.verify("set").faults
    split = ShardSet.open("set").split("train")
    image, mask = split.image(0), split.mask(0)

`build` and `verify` are the modules of these functions. The names of `__all__` are imported when they are first used,
so that `import shards` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shards import build, verify
    from shards.build import BuildResult
    from shards.errors import CorruptShardError, ShardSetError, SourceError, ToolkitError, UsageError
    from shards.inputs.match import BadInputError
    from shards.planning.plan import BuildOptions
    from shards.reader import ShardSet, Split
    from shards.verify import Verified

__all__ = [
    "BadInputError",
    "BuildOptions",
    "BuildResult",
    "CorruptShardError",
    "ShardSet",
    "ShardSetError",
    "SourceError",
    "Split",
    "ToolkitError",
    "UsageError",
    "Verified",
    "build",
    "verify",
]

_MODULES = {
    "BadInputError": "shards.inputs.match",
    "BuildOptions": "shards.planning.plan",
    "BuildResult": "shards.build",
    "CorruptShardError": "shards.errors",
    "ShardSet": "shards.reader",
    "ShardSetError": "shards.errors",
    "SourceError": "shards.errors",
    "Split": "shards.reader",
    "ToolkitError": "shards.errors",
    "UsageError": "shards.errors",
    "Verified": "shards.verify",
}
"""The module of each public class."""


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
