"""Masks for images that nobody has drawn yet, each at its own resolution."""

from __future__ import annotations

import contextlib
import csv
import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image
from rich.progress import Progress
from torch import nn

from isicdist import processes
from isicdist.augment import normalise, to_unit
from isicdist.checkpoint import load_model
from isicdist.files import publish
from shards.errors import SourceError
from shards.geometry import Fit
from shards.pair import BadPairError, load_image
from shards.source import MASK_SUFFIX, File, Source, find, images_only

BATCH = 8
"""Images of one forward pass."""


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What became of the images."""

    masks: int
    """Masks written."""
    rejected: int
    """Images that could not be read; each has a row in OUT/rejected.csv."""


@torch.inference_mode()
def probabilities(model: nn.Module, images: np.ndarray, card: dict[str, Any], device: torch.device) -> np.ndarray:
    """Lesion probabilities (B, H, W) float32 of fitted images (B, H, W, 3) uint8."""
    batch = torch.from_numpy(images).to(device).permute(0, 3, 1, 2)  # (B, 3, H, W)
    logits = model(normalise(to_unit(batch), tuple(card["mean"]), tuple(card["std"])))
    return logits.float().sigmoid()[:, 0].cpu().numpy()


def predict(checkpoint: Path, images: str, out: Path) -> Predicted | None:
    """Write OUT/KEY_segmentation.png, 0 and 255, for each image of a folder, an archive or a URL.

    Under `accelerate launch` each process takes its own images; the result is None on all but the main one. Images
    that cannot be read are listed in OUT/rejected.csv. Raises SourceError when there is no image, or two of one name,
    and CheckpointError for the model.
    """
    accelerator = processes.start()
    model, card = load_model(checkpoint)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    sources, files = find([images])
    rejected: list[tuple[str, str, str]] = []
    done = 0
    with contextlib.ExitStack() as opened:
        for source in sources:
            opened.callback(source.close)
        files = _unique(images_only(files), images)[accelerator.process_index :: accelerator.num_processes]
        out.mkdir(parents=True, exist_ok=True)
        pool = opened.enter_context(ThreadPoolExecutor(os.cpu_count()))
        progress = opened.enter_context(Progress(disable=not accelerator.is_main_process))
        task = progress.add_task("predict", total=len(files))
        for batch in _batches(pool, files, sources, card, rejected):
            probs = probabilities(model, np.stack([fitted for _, fitted, _ in batch]), card, accelerator.device)
            for (file, _, fit), prob in zip(batch, probs, strict=True):
                mask = (fit.restore(prob) > card["threshold"]).astype(np.uint8) * 255
                _save_png(out / f"{PurePosixPath(file.name).stem}{MASK_SUFFIX}.png", mask)
            done += len(batch)
            progress.update(task, completed=done + len(rejected))
    rejected, masks = gather_object(rejected), gather_object([done])
    if not accelerator.is_main_process:
        return None
    _save_rejected(out / "rejected.csv", rejected)
    return Predicted(masks=sum(masks), rejected=len(rejected))


def _batches(
    pool: ThreadPoolExecutor,
    files: list[File],
    sources: list[Source],
    card: dict[str, Any],
    rejected: list[tuple[str, str, str]],
) -> Iterator[list[tuple[File, np.ndarray, Fit]]]:
    """Fitted images in batches, decoded by the pool one batch ahead; what cannot be read goes to `rejected`."""

    def load(file: File) -> tuple[File, np.ndarray, Fit] | None:
        try:
            picture, fit = load_image(file, sources, card["fit"], card["size"])
        except BadPairError as error:
            rejected.append((error.file.name, error.reason, error.detail))
            return None
        return file, fit.image(picture), fit

    chunks = [files[start : start + BATCH] for start in range(0, len(files), BATCH)] or [[]]
    loading = [pool.submit(load, file) for file in chunks[0]]
    for following in [*chunks[1:], []]:
        loaded = [future.result() for future in loading]
        loading = [pool.submit(load, file) for file in following]
        if batch := [image for image in loaded if image]:
            yield batch


def _unique(files: list[File], place: str) -> list[File]:
    if not files:
        raise SourceError(f"{place}: there is no .jpg, .png or .bmp image in it")
    seen: dict[str, str] = {}
    for file in files:
        stem = PurePosixPath(file.name).stem.lower()
        if stem in seen:
            raise SourceError(f"{place}: {seen[stem]} and {file.name} would have one mask; rename one of them")
        seen[stem] = file.name
    return files


def _save_rejected(path: Path, rejected: list[tuple[str, str, str]]) -> None:
    if not rejected:
        path.unlink(missing_ok=True)  # what an earlier prediction into the same folder left
        return
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("path", "reason", "detail"), *sorted(rejected)])
    publish(path, text.getvalue().encode())


def _save_png(path: Path, mask: np.ndarray) -> None:
    png = io.BytesIO()
    Image.fromarray(mask).save(png, "PNG")
    publish(path, png.getvalue())
