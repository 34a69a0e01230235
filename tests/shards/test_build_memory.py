"""Memory of a build worker for the largest photographs of the archive."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

BUILD = """
import resource, sys
from shards.build import build
from shards.planning.plan import BuildOptions

build(sys.argv[1], sys.argv[1], sys.argv[2], BuildOptions(split="train=1", original_masks="all"), workers=2)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.mark.parametrize("kind", ["jpg", pytest.param("png", marks=pytest.mark.slow)])
def test_a_worker_stays_below_400_mb_with_photographs_of_6700_by_4500_pixels(tmp_path: Path, kind: str):
    source = tmp_path / "in"
    source.mkdir()
    for seed in range(2):
        coarse = np.random.default_rng(seed).integers(0, 255, (45, 67, 3), dtype=np.uint8)
        options: dict[str, Any] = {"compress_level": 1} if kind == "png" else {"quality": 90}
        Image.fromarray(coarse).resize((6700, 4500)).save(source / f"I{seed}.{kind}", **options)
        mask = Image.fromarray((coarse[..., 0] > 128) * np.uint8(255)).resize((6700, 4500), Image.Resampling.NEAREST)
        mask.save(source / f"I{seed}_segmentation.png")
    words = [sys.executable, "-c", BUILD, str(source), str(tmp_path / "set")]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    assert int(ended.stdout) < 400_000  # kB
