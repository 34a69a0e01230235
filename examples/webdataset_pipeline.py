"""Read the planned order through webdataset: python examples/webdataset_pipeline.py SET.

The stages after `PlannedSource` are yours; decoding is Pillow's here. Each rank gets its part of one global order, each
sample once. Do not hand the loader to `accelerator.prepare`: it would divide the samples a second time.
"""

from __future__ import annotations

import argparse
import io
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader
from webdataset import filters
from webdataset.pipeline import DataPipeline

from isicdist import BatchPlan, PlannedSource
from shards import ShardSet

Batch = tuple[list[str], np.ndarray, np.ndarray]
"""Keys, images (B, H, W, 3) uint8 and masks (B, H, W) bool."""


def decode(sample: dict[str, Any]) -> tuple[str, np.ndarray, np.ndarray]:
    """Decode the bytes of one sample: its key, image (H, W, 3) uint8 and mask (H, W) bool."""
    image = np.asarray(Image.open(io.BytesIO(sample["jpg"])))
    return sample["__key__"], image, np.asarray(Image.open(io.BytesIO(sample["mask.png"])))


def batches(split_location: str, *, rank: int = 0, world_size: int = 1, workers: int = 2) -> Iterator[Batch]:
    """Yield the batches of one epoch of one rank."""
    plan = BatchPlan(global_size=8, micro_size=4, world_size=world_size)
    source = PlannedSource(ShardSet.open(split_location).split("train"), plan, rank, seed=0)  # source.epoch = 1, ...
    pipeline = DataPipeline(source, filters.map(decode), filters.batched(plan.micro_size))
    # `collate_fn`: or the arrays of the pipeline would become tensors.
    loader = DataLoader(pipeline, batch_size=None, num_workers=workers, collate_fn=tuple)  # pyright: ignore[reportArgumentType]
    yield from loader


def main(arguments: list[str] | None = None) -> None:
    """Print the keys of each batch; RANK and WORLD_SIZE are the launcher's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", help="a shard set that `isic-shards build` made")
    options = parser.parse_args(arguments)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    for keys, images, masks in batches(options.set, rank=rank, world_size=world_size):
        print(f"{', '.join(keys)}: images {images.shape}, lesion {masks.mean():.1%}")


if __name__ == "__main__":
    main()
