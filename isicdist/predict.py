"""Prediction of the lesion masks of images, each at its own resolution, by one model or an ensemble."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object

from isicdist.config import Tta
from isicdist.distributed import launch
from isicdist.distributed.agree import raise_on_lost_rank
from isicdist.network.cpu_precision import faster_cpu_precision
from isicdist.network.ensemble import Ensemble, load_ensemble
from isicdist.network.segmenter import InputSpec
from isicdist.network.unet import SIZE_DIVISOR
from isicdist.outputs import FOLDERS, Outputs, check_ids, write_submission
from shards.errors import SourceError, UsageError
from shards.files import write_file
from shards.format import parse_json
from shards.geometry import ResizePlan
from shards.inputs.decode import BadPairError, load_image
from shards.inputs.match import MASK_SUFFIX, Rejected, images_only
from shards.inputs.source import File, Source, open_sources
from shards.progress import progress
from shards.tables import csv_bytes
from shards.urls import without_password

BATCH_PIXELS = 2**19
"""Pixels of one forward pass on a CPU: 32 images of 128 pixels a side, 8 of 256, 2 of 512."""
GPU_BATCH_PIXELS = 2**21
"""The same on a GPU: 32 images of 256 pixels a side, 8 of 512."""
SETTINGS_NAME, REJECTED_NAME = "predict.json", "rejected.csv"


@dataclass(frozen=True, kw_only=True)
class PredictionCounts:
    """Numbers of images by their outcome, over all processes."""

    masks: int
    """Masks written."""
    reused: int = 0
    """Masks that an earlier prediction with the same settings had written."""
    rejected: int = 0
    """Images that cannot be used; each has a row in OUT/rejected.csv."""
    ignored: tuple[str, ...] = ()
    """Names of the files that are masks, superpixels or no images by their names."""


@dataclass(frozen=True, kw_only=True)
class PreparedImage:
    """One image, decoded and resized to the input of each network."""

    file: File
    plans: dict[InputSpec, ResizePlan]
    images: dict[InputSpec, np.ndarray]
    """(size, size, 3) uint8 RGB each."""


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

    The probabilities of several checkpoints are averaged. Under `accelerate launch` each process predicts its own
    share of the images; the result is None on all but the main one. An interrupted prediction is resumed: the images
    whose files do not exist are shared out anew, and OUT/predict.json records the settings of those that do. Images
    that cannot be used are listed in OUT/rejected.csv.
    Raises SourceError when there is no image, none that can be used, or two of one name; UsageError when OUT holds
    masks made with other settings or by other means; CheckpointError for a model that is missing or damaged.
    """
    accelerator = launch.start(launch.MAX_IDLE_SECONDS, probe_cpu=faster_cpu_precision)
    ensemble = load_ensemble(checkpoints)
    outputs = Outputs(folder=out, probabilities=probabilities, overlay=overlay)
    sources, found = open_sources([images])
    files, unsupported, ignored = images_only(_without_outputs(out, images, found))
    _check_names(files, unsupported, ignored, images)
    if submission:
        check_ids(files)
    location = without_password(images) if "://" in images else str(Path(images).resolve())
    settings = {**ensemble.identity(), "tta": tta, "images": location}
    _check_settings(outputs, settings, files)
    # Of the main process, as a file system of several machines may show others an older state.
    remaining: list[File] = broadcast_object_list([[file for file in files if not outputs.are_complete(file)]])[0]
    reused = len(files) - len(remaining)
    accelerator.wait_for_everyone()  # every process has looked before the first one writes
    accelerator.on_main_process(_write_settings)(outputs, settings)
    accelerator.wait_for_everyone()

    ensemble.prepare(accelerator)
    own_files = remaining[accelerator.process_index :: accelerator.num_processes]
    rejected = unsupported[accelerator.process_index :: accelerator.num_processes]
    masks = 0
    with ExitStack() as opened:
        for source in sources:
            opened.callback(source.close)
        report = opened.enter_context(progress("predict", "images", shown=accelerator.is_main_process))
        predicted = _predict_files(own_files, sources, ensemble, accelerator.device, tta, outputs)
        for done, rejection in enumerate(predicted, start=1):
            report(done, len(own_files))
            masks += rejection is None
            rejected += [rejection] if rejection else []

    rejected, masks = gather_object(rejected), sum(gather_object([masks]))
    accelerator.end_training()  # a process that ends with its group still up may abort
    if not accelerator.is_main_process:
        return None
    _write_rejected(out / REJECTED_NAME, rejected)
    if not masks + reused:
        raise SourceError(f"{images}: none of its {len(rejected)} images can be used; {out / REJECTED_NAME} says why")
    if submission and rejected:
        raise SourceError(
            f"{submission}: not written, as {len(rejected)} of the images have no mask; see {out / REJECTED_NAME}"
        )
    if submission:
        write_submission(submission, [outputs.mask(file) for file in files])
    return PredictionCounts(
        masks=masks,
        reused=reused,
        rejected=len(rejected),
        ignored=_ignored_names(ignored, files, images, outputs),
    )


def _predict_files(
    files: list[File], sources: list[Source], ensemble: Ensemble, device: torch.device, tta: Tta, outputs: Outputs
) -> Iterator[Rejected | None]:
    """Predict the files in batches; yields None for each mask that is written, and the reason for each that is not.

    Threads prefetch and decode images, two for each thread beside those of the batch that the networks compute, and
    write the masks of earlier ones; so at large sizes, where a batch has two images, all threads are busy.
    """

    def restore_and_write(image: PreparedImage, probs: dict[InputSpec, np.ndarray]) -> None:
        picture = np.asarray(load_image(image.file, sources, "original", None)[0]) if outputs.overlay else None
        outputs.write(image.file, ensemble.restore_mean(probs, image.plans), ensemble.threshold, picture)

    pixels = BATCH_PIXELS if device.type == "cpu" else GPU_BATCH_PIXELS
    size, threads = max(1, pixels // ensemble.input_specs[0].size ** 2), launch.worker_threads()
    upcoming = iter(files)
    loading: deque[Future[PreparedImage | Rejected]] = deque()
    writing: deque[Future[None]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        while True:
            for file in islice(upcoming, size + 2 * threads - len(loading)):
                loading.append(pool.submit(_prepare, file, sources, ensemble.input_specs))
            if not loading:
                break
            loaded = [loading.popleft().result() for _ in range(min(size, len(loading)))]
            prepared = [image for image in loaded if isinstance(image, PreparedImage)]
            probs = ensemble.sum_probs([image.images for image in prepared], device, tta)
            writing.extend(pool.submit(restore_and_write, *each) for each in zip(prepared, probs, strict=True))
            while len(writing) > size + 2 * threads:
                yield writing.popleft().result()
            yield from (row for row in loaded if isinstance(row, Rejected))
        yield from (future.result() for future in writing)


def _prepare(file: File, sources: list[Source], specs: list[InputSpec]) -> PreparedImage | Rejected:
    """Decode one image and resize it to each input; the reason where it cannot be used."""
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


def _without_outputs(out: Path, images: str, files: list[File]) -> list[File]:
    """Remove the pictures of predictions from the files: into OUT, and into any folder with a record of one."""
    root, folder = Path(images).resolve(), out.resolve()
    predicted = [PurePosixPath(file.name).parent for file in files if PurePosixPath(file.name).name == SETTINGS_NAME]
    predicted += [PurePosixPath(folder.relative_to(root))] if folder.is_relative_to(root) else []
    output_folders = {folder / name for folder in predicted for name in FOLDERS}
    return [file for file in files if PurePosixPath(file.name).parent not in output_folders]


def _ignored_names(ignored: list[File], files: list[File], images: str, outputs: Outputs) -> tuple[str, ...]:
    """Name the ignored files, without the masks and tables of an earlier prediction into the folder of the images."""
    written = {outputs.mask(file).resolve() for file in files}
    written |= {(outputs.folder / name).resolve() for name in (SETTINGS_NAME, REJECTED_NAME)}
    return tuple(file.name for file in ignored if (Path(images) / file.name).resolve() not in written)


def describe_ignored(names: Sequence[str]) -> str:
    """Describe the ignored files, at least one, in a message; of all, a photograph named as a mask would surprise."""
    example = min(names, key=lambda name: not PurePosixPath(name).stem.lower().endswith(MASK_SUFFIX))
    return f"{len(names)} ignored, as their names are those of masks, superpixels or no images, such as {example}"


def _check_names(files: list[File], unsupported: list[Rejected], ignored: list[File], location: str) -> None:
    """Raise SourceError where there is no image, or two would have the same mask."""
    if not files:
        others = [f"{len(unsupported)} of a type that is not read"] if unsupported else []
        others += [describe_ignored([file.name for file in ignored])] if ignored else []
        but = f" (but {', '.join(others)})" if others else ""
        raise SourceError(f"{location}: there is no .jpg, .png or .bmp image in it{but}")
    seen: dict[str, str] = {}
    for file in files:
        stem = PurePosixPath(file.name).stem.lower()
        if stem in seen:
            raise SourceError(f"{location}: {seen[stem]} and {file.name} would have one mask; rename one of them")
        seen[stem] = file.name


def _check_settings(outputs: Outputs, settings: dict[str, Any], files: list[File]) -> None:
    """Raise UsageError where OUT holds masks made with other settings, or not by a prediction."""
    path = outputs.folder / SETTINGS_NAME
    try:
        earlier = parse_json(path.read_bytes())
        earlier["images"] = without_password(earlier["images"])  # an earlier version recorded it
        changes = [f"{name} {earlier[name]}, not {value}" for name, value in settings.items() if earlier[name] != value]
    except FileNotFoundError:
        foreign = next((mask for mask in map(outputs.mask, files) if mask.exists()), None)
        if foreign:
            raise UsageError(f"{foreign}: there already, and not of a prediction; give another --out") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: not what a prediction writes; give another --out") from error
    else:
        if changes:
            raise UsageError(f"{outputs.folder}: its masks are made with {'; '.join(changes)}; give another --out")


def _write_settings(outputs: Outputs, settings: dict[str, Any]) -> None:
    outputs.make_folders()
    write_file(outputs.folder / SETTINGS_NAME, json.dumps(settings, indent=1).encode())


def _write_rejected(path: Path, rejected: list[Rejected]) -> None:
    if not rejected:
        path.unlink(missing_ok=True)  # of an earlier prediction into the same folder
        return
    rows = sorted((row.path, row.reason, row.detail) for row in rejected)
    write_file(path, csv_bytes(("path", "reason", "detail"), rows))
