"""Masks for images that nobody has drawn yet, each at its own resolution."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from rich.progress import Progress

from isicdist.config import Tta
from isicdist.distributed import launch
from isicdist.distributed.agree import raise_on_lost_rank
from isicdist.network.cpu_precision import faster_cpu_precision
from isicdist.network.segmenter import Ensemble, InputSpec, load_model
from isicdist.network.unet import SIZE_DIVISOR
from isicdist.outputs import FOLDERS, Outputs, check_ids, write_submission
from shards.errors import SourceError, UsageError
from shards.files import write_file
from shards.geometry import ResizePlan
from shards.inputs.decode import BadPairError, load_image
from shards.inputs.match import Rejected, images_only
from shards.inputs.source import File, Source, open_sources
from shards.parallel.processes import available_cores
from shards.tables import csv_bytes

BATCH_PIXELS = 2**19
"""Pixels of one forward pass: 32 images of 128 pixels a side, 8 of 256, 2 of 512."""
RECORD, REJECTED = "predict.json", "rejected.csv"


@dataclass(frozen=True, kw_only=True)
class PredictionCounts:
    """What became of the images."""

    masks: int
    """Masks written."""
    kept: int = 0
    """Masks that were there already."""
    rejected: int = 0
    """Images that cannot be used; each has a row in OUT/rejected.csv."""


@dataclass(frozen=True, kw_only=True)
class PreparedImage:
    """One image as the networks are to see it."""

    file: File
    plans: dict[InputSpec, ResizePlan]
    images: dict[InputSpec, np.ndarray]
    """(H, W, 3) uint8 each."""


@raise_on_lost_rank()
def predict(
    checkpoints: Sequence[Path],
    images: str,
    out: Path,
    *,
    tta: Tta = "off",
    probabilities: bool = False,
    overlay: bool = False,
    submission: Path | None = None,
) -> PredictionCounts | None:
    """Write OUT/KEY_segmentation.png for each image of a folder, an archive, a URL or a single file.

    The probabilities of several checkpoints are averaged. Under `accelerate launch` each process takes its own
    images; the result is None on all but the main one. An image whose files are there is not predicted again:
    OUT/predict.json says what they were made with. Images that cannot be used are listed in OUT/rejected.csv.
    Raises SourceError when there is no image, none that can be used, or two of one name; UsageError when OUT was
    made otherwise; CheckpointError for a model.
    """
    accelerator = launch.start(probe_cpu=faster_cpu_precision)
    ensemble = Ensemble([load_model(checkpoint) for checkpoint in checkpoints])
    outputs = Outputs(folder=out, probabilities=probabilities, overlay=overlay)
    sources, found = open_sources([images])
    files, unsupported = images_only(_not_of(out, images, found))
    _check_names(files, unsupported, images)
    if submission:
        check_ids(files)
    record = {**ensemble.identity(), "tta": tta, "images": images if "://" in images else str(Path(images).resolve())}
    _check_record(outputs, record, files)
    accelerator.wait_for_everyone()  # nobody finds there what another process has just written
    accelerator.on_main_process(_begin)(outputs, record)
    accelerator.wait_for_everyone()

    ensemble.prepare(accelerator)
    mine = files[accelerator.process_index :: accelerator.num_processes]
    rejected = unsupported[accelerator.process_index :: accelerator.num_processes]
    wanted = [file for file in mine if not outputs.is_done(file)]
    kept, masks = len(mine) - len(wanted), 0
    with ExitStack() as opened:
        for source in sources:
            opened.callback(source.close)
        progress = opened.enter_context(Progress(disable=not accelerator.is_main_process))
        task = progress.add_task("predict", total=len(mine), completed=kept)
        for refused in _segment(wanted, sources, ensemble, accelerator.device, tta, outputs):
            progress.advance(task)
            masks += refused is None
            rejected += [refused] if refused else []

    rejected, masks, kept = gather_object(rejected), sum(gather_object([masks])), sum(gather_object([kept]))
    accelerator.end_training()  # a process that ends with its group still up may abort
    if not accelerator.is_main_process:
        return None
    _save_rejected(out / REJECTED, rejected)
    if not masks + kept:
        raise SourceError(f"{images}: none of its {len(rejected)} images can be used; {out / REJECTED} says why")
    if submission and rejected:
        raise SourceError(
            f"{submission}: not written, as {len(rejected)} of the images have no mask; see {out / REJECTED}"
        )
    if submission:
        write_submission(submission, [outputs.mask(file) for file in files])
    return PredictionCounts(masks=masks, kept=kept, rejected=len(rejected))


def _segment(
    files: list[File], sources: list[Source], ensemble: Ensemble, device: torch.device, tta: Tta, outputs: Outputs
) -> Iterator[Rejected | None]:
    """Predict the files, one after the other; yields None for a mask that is written, or why there is none.

    Threads decode the next batch and write the last one while the networks are at work on this one.
    """

    def finish(image: PreparedImage, probs: dict[InputSpec, np.ndarray]) -> None:
        picture = np.asarray(load_image(image.file, sources, "original", None)[0]) if outputs.overlay else None
        outputs.write(image.file, ensemble.restore_mean(probs, image.plans), ensemble.threshold, picture)

    size = max(1, BATCH_PIXELS // ensemble.input_specs[0].size ** 2)
    loading: list[Future[PreparedImage | Rejected]] = []
    writing: list[Future[None]] = []
    with ThreadPoolExecutor(_threads()) as pool:
        for start in range(0, len(files) + size, size):
            loaded = [future.result() for future in loading]
            loading = [pool.submit(_load, file, sources, ensemble.input_specs) for file in files[start : start + size]]
            shown = [image for image in loaded if isinstance(image, PreparedImage)]
            probs = ensemble.sum_probs([image.images for image in shown], device, tta)
            yield from (future.result() for future in writing)
            writing = [pool.submit(finish, *each) for each in zip(shown, probs, strict=True)]
            yield from (row for row in loaded if isinstance(row, Rejected))
        yield from (future.result() for future in writing)


def _load(file: File, sources: list[Source], specs: list[InputSpec]) -> PreparedImage | Rejected:
    try:
        picture, plan = load_image(file, sources, *specs[0])
        height, width = plan.original
        if min(height, width) < SIZE_DIVISOR:
            detail = f"{width} × {height} pixels; at least {SIZE_DIVISOR} × {SIZE_DIVISOR} are needed"
            raise BadPairError(file, "too-small", detail)
    except BadPairError as error:
        return Rejected(error.file.name, error.reason, error.detail)
    plans = {spec: spec.resize_plan(height, width) for spec in specs}
    images = {spec: plan.resize_image(picture) for spec, plan in plans.items()}
    return PreparedImage(file=file, plans=plans, images=images)


def _threads() -> int:
    """This process's share of the machine's cores."""
    return max(2, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _not_of(out: Path, images: str, files: list[File]) -> list[File]:
    """The files without the pictures of an earlier prediction, where OUT lies in the folder of the images."""
    root, folder = Path(images).resolve(), out.resolve()
    if not folder.is_relative_to(root):
        return files
    ours = [folder.relative_to(root) / name for name in FOLDERS]
    return [file for file in files if PurePosixPath(file.name).parent not in ours]


def _check_names(files: list[File], unsupported: list[Rejected], place: str) -> None:
    if not files:
        others = f" (but {len(unsupported)} of a type that is not read)" if unsupported else ""
        raise SourceError(f"{place}: there is no .jpg, .png or .bmp image in it{others}")
    seen: dict[str, str] = {}
    for file in files:
        stem = PurePosixPath(file.name).stem.lower()
        if stem in seen:
            raise SourceError(f"{place}: {seen[stem]} and {file.name} would have one mask; rename one of them")
        seen[stem] = file.name


def _check_record(outputs: Outputs, record: dict[str, Any], files: list[File]) -> None:
    """Raise UsageError where OUT holds masks that are not of this prediction."""
    path = outputs.folder / RECORD
    try:
        there = json.loads(path.read_text())
        different = [f"{name} {there[name]}, not {value}" for name, value in record.items() if there[name] != value]
    except FileNotFoundError:
        foreign = next((mask for mask in map(outputs.mask, files) if mask.exists()), None)
        if foreign:
            raise UsageError(f"{foreign}: there already, and not of a prediction; give another --out") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: not what a prediction writes; give another --out") from error
    else:
        if different:
            raise UsageError(f"{outputs.folder}: made with {'; '.join(different)}; give another --out, or remove it")


def _begin(outputs: Outputs, record: dict[str, Any]) -> None:
    outputs.make_folders()
    write_file(outputs.folder / RECORD, json.dumps(record, indent=1).encode())


def _save_rejected(path: Path, rejected: list[Rejected]) -> None:
    if not rejected:
        path.unlink(missing_ok=True)  # what an earlier prediction into the same folder left
        return
    rows = sorted((row.path, row.reason, row.detail) for row in rejected)
    write_file(path, csv_bytes(("path", "reason", "detail"), rows))
