"""Small generated images and masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.inputs.match import Pair
from shards.inputs.source import File


def photograph(seed: int, height: int = 60, width: int = 80) -> np.ndarray:
    """A smooth picture (H, W, 3) uint8."""
    coarse = np.random.default_rng(seed).integers(60, 200, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def disc(height: int = 60, width: int = 80, *, left: float = 0.4, top: float = 0.5) -> np.ndarray:
    """A mask (H, W) uint8 of 0 and 255, off centre so that its rotations differ."""
    y, x = np.mgrid[:height, :width]
    return np.where((y / height - top) ** 2 + (x / width - left) ** 2 < 0.06, 255, 0).astype(np.uint8)


def write_pair(folder: Path, key: str, seed: int, height: int = 60, width: int = 80) -> None:
    """One pair as in the ISIC 2018 archives, both in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photograph(seed, height, width)).save(folder / f"{key}.jpg", quality=95)
    Image.fromarray(disc(height, width)).save(folder / f"{key}_segmentation.png")


def pair_of(key: str, group: str | None = None) -> Pair:
    """A pair of files that need not exist, by its key."""
    return Pair(key, File(0, f"{key}.jpg", 1), File(0, f"{key}_segmentation.png", 1), group or key)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pairs in one folder; read only."""
    folder = tmp_path_factory.mktemp("pictures")
    for seed in range(40):
        write_pair(folder, f"ISIC_{seed:07d}", seed)
    return folder
