"""The loaders that stream.py compares: each opens a set, importing what it needs, and returns what reads an epoch."""

from __future__ import annotations

import importlib
import importlib.util
import io
import multiprocessing
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

BATCH, WORKERS = 16, 2

Epoch = Callable[[], Iterator[Any]]
"""Gives the batches of one more epoch: (images, masks)."""


def decoded(jpg: bytes, png: bytes, codec: str) -> tuple[np.ndarray, np.ndarray]:
    """A sample for the other loaders: image (H, W, 3) and mask (H, W), uint8."""
    from PIL import Image

    if codec == "simplejpeg":
        image = simplejpeg.decode_jpeg(jpg, "RGB")
    else:
        image = np.array(Image.open(io.BytesIO(jpg)).convert("RGB"))
    return image, np.array(Image.open(io.BytesIO(png)), dtype=np.uint8)


def open_isicdist(data: Path, *, cached: bool = False) -> Epoch:
    from isicdist.data.decoded_cache import DecodedCache
    from isicdist.data.order import BatchPlan
    from isicdist.data.stream import Stream
    from shards.reader import ShardSet
    from shards.remote.cache_folder import cache_root

    split = ShardSet.open(data).split("train")
    cache = DecodedCache(split, cache_root() / "decoded") if cached else None
    plan = BatchPlan(global_size=BATCH, micro_size=BATCH, world_size=1)
    stream = Stream(split, plan, 0, workers=WORKERS, decoded=cache)
    return lambda: ((batch.images, batch.masks) for batch in stream.epoch())


def open_processes(data: Path) -> Epoch:
    import torch

    from isicdist.data.order import BatchPlan, epoch_order, num_steps, rank_slice
    from shards.reader import ShardSet

    split = ShardSet.open(data).split("train")
    size, plan = split.size or 0, BatchPlan(global_size=BATCH, micro_size=BATCH, world_size=1)
    slots = 2 * WORKERS + 1
    images = torch.zeros((slots, BATCH, size, size, 3), dtype=torch.uint8).share_memory_()
    masks = torch.zeros((slots, BATCH, size, size), dtype=torch.uint8).share_memory_()
    context = multiprocessing.get_context("fork")

    def work(tasks: Connection) -> None:
        views = images.numpy(), masks.numpy()
        with suppress(EOFError):
            while True:
                slot, numbers = tasks.recv()
                for place, number in enumerate(numbers):
                    if number >= 0:
                        split.sample(number, views[0][slot, place], views[1][slot, place])
                tasks.send(slot)

    pipes = [context.Pipe() for _ in range(WORKERS)]
    for _, end in pipes:
        context.Process(target=work, args=(end,), daemon=True).start()
    count = iter(range(1 << 30))

    def epoch() -> Iterator[Any]:
        order = epoch_order(split, 0, next(count))
        steps = num_steps(len(order), BATCH)
        for step in range(-slots + 1, steps):  # the ring is filled first
            ahead = step + slots - 1
            if ahead < steps:
                pipes[ahead % WORKERS][0].send((ahead % slots, rank_slice(order, ahead, plan, 0)[0].tolist()))
            if step >= 0:
                slot = pipes[step % WORKERS][0].recv()
                yield images[slot].permute(0, 3, 1, 2), masks[slot][:, None]

    return epoch


def open_webdataset(data: Path, codec: str) -> Epoch:
    from webdataset import WebDataset, WebLoader  # pyright: ignore[reportAttributeAccessIssue]  as documented

    urls = sorted(str(path) for path in (data / "train").glob("*.tar"))
    dataset = WebDataset(urls, shardshuffle=100)
    dataset = dataset.shuffle(100).to_tuple("jpg", "mask.png").map(lambda sample: decoded(*sample, codec))  # pyright: ignore[reportCallIssue]
    loader = WebLoader(dataset.batched(BATCH), batch_size=None, num_workers=WORKERS, persistent_workers=True)
    return lambda: ((images.permute(0, 3, 1, 2), masks) for images, masks in loader)


def open_mosaicml(folder: Path, codec: str) -> Epoch:
    from torch.utils.data import DataLoader

    streaming = import_streaming()
    streaming.base.util.clean_stale_shared_memory()

    class Samples(streaming.StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            sample = super().__getitem__(at)
            return decoded(sample["jpg"], sample["png"], codec)

    dataset: Any = Samples(local=str(folder / "mosaicml"), shuffle=True, batch_size=BATCH)
    loader = DataLoader(dataset, BATCH, num_workers=WORKERS, persistent_workers=True)
    return lambda: ((images.permute(0, 3, 1, 2), masks) for images, masks in loader)


def open_litdata(folder: Path, codec: str) -> Epoch:
    litdata: Any = importlib.import_module("litdata")

    class Samples(litdata.StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            sample = super().__getitem__(index)
            return decoded(sample["jpg"], sample["png"], codec)

    dataset: Any = Samples(str(folder / "litdata"), shuffle=True)
    loader = litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=WORKERS, persistent_workers=True)
    return lambda: ((images.permute(0, 3, 1, 2), masks) for images, masks in loader)


def open_folder(folder: Path, codec: str) -> Epoch:
    from torch.utils.data import DataLoader, Dataset

    class Samples(Dataset[Any]):
        paths = sorted((folder / "files").glob("*.jpg"))

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, at: int) -> Any:
            return decoded(self.paths[at].read_bytes(), self.paths[at].with_suffix(".png").read_bytes(), codec)

    loader = DataLoader(Samples(), BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True)
    return lambda: ((images.permute(0, 3, 1, 2), masks) for images, masks in loader)


def open_contender(name: str, data: Path, folder: Path) -> Epoch:
    peer, _, codec = name.partition("-")
    if peer == "isicdist":
        return open_processes(data) if codec == "processes" else open_isicdist(data, cached=codec == "cached")
    if peer == "webdataset":
        return open_webdataset(data, codec)
    return {"mosaicml": open_mosaicml, "litdata": open_litdata, "folder": open_folder}[peer](folder, codec)


def import_streaming() -> Any:
    """mosaicml-streaming, with empty modules for what it imports without a use for it here and is not installed."""
    vision = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
    text = ("transformers", "transformers.feature_extraction_utils", "transformers.tokenization_utils_base")
    models = ("transformers.models", "transformers.models.auto", "transformers.models.auto.tokenization_auto")
    for names in (vision, (*text, *models)):
        if names[0] in sys.modules or importlib.util.find_spec(names[0]):
            continue
        for name in names:
            module: Any = types.ModuleType(name)
            module.__path__ = []
            module.__getattr__ = stand_in
            sys.modules[name] = module
    return importlib.import_module("streaming")


def stand_in(name: str) -> type:
    """A class for a name that is imported and not used."""
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})
