"""Audit of a shard set: rank its pairs by how suspicious their masks are, from probabilities of unseen images.

The images of train and val are predicted by the model of a cross-validation that held them out, those of every other
split by the ensemble of all. The result is OUT/audit.csv, a row for every pair; OUT/audit.html, a page to go through
the most suspicious ones; and OUT/summary.json. A table with verdicts, saved from the page or written by hand, is what
`isic-shards build --exclude` and `isicdist evaluate --exclude` read (`shards.exclusions`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from isicdist.data.folds import read_duplicates
from isicdist.distributed import launch
from isicdist.network.cpu_precision import faster_cpu_precision
from isicdist.network.ensemble import load_ensemble
from shards.errors import UsageError
from shards.exclusions import VERDICT_COLUMN
from shards.files import write_file
from shards.progress import Report, progress
from shards.reader import ShardSet
from shards.tables import csv_bytes

if TYPE_CHECKING:
    from isicdist.audit.findings import Finding, TwinMasks
    from isicdist.audit.held_out import Sample

TABLE_NAME, PAGE_NAME, SUMMARY_NAME = "audit.csv", "audit.html", "summary.json"
COLUMNS = ("rank", "id", "split", "score", "reason", "detail", "dice", "expected_dice", VERDICT_COLUMN)


@dataclass(frozen=True, kw_only=True)
class AuditCounts:
    """Numbers of images."""

    images: int
    reasons: Mapping[str, int]
    """Images by reason (`isicdist.audit.findings.REASONS`); those without any are left out."""


def audit(data: str, runs: Path, out: Path) -> AuditCounts:
    """Rank the pairs of the set `data` by the models of the cross-validation in the folder `runs`.

    Raises UsageError without scipy, under several processes and for a folder `out` with an earlier audit;
    CheckpointError where `runs` is no complete cross-validation of this set; ShardSetError for a set that is
    incomplete, damaged or has no masks.
    """
    if importlib.util.find_spec("scipy") is None:
        raise UsageError("the audit needs scipy: pip install 'isicdist[audit]'")
    if (out / TABLE_NAME).exists():
        raise UsageError(f"{out}: holds an audit, maybe with verdicts; give another --out or remove it")
    from isicdist.audit.held_out import held_out_splits, predict
    from isicdist.audit.page import render_page

    accelerator = launch.start(launch.MAX_IDLE_SECONDS, probe_cpu=faster_cpu_precision)
    if accelerator.num_processes > 1:
        raise UsageError("isicdist audit runs in one process; start it without accelerate launch")
    shards, ensemble = ShardSet.open(data), load_ensemble([runs])
    parts = held_out_splits(shards, runs, ensemble)
    ensemble.prepare(accelerator)
    total, size = sum(len(part.split) for part in parts), ensemble.input_spec.size
    out.mkdir(parents=True, exist_ok=True)
    with (
        progress("predict", "images") as report,
        tempfile.TemporaryDirectory(dir=out, prefix=".probabilities-") as scratch,  # of a large set, more than memory
    ):
        levels = np.memmap(Path(scratch) / "levels", np.uint8, "w+", shape=(total, size, size))
        samples = predict(parts, accelerator, levels, lambda done: report(done, total))
        findings = find(samples, shards, report)
        page = render_page(findings, samples, shards)
    reasons = dict(Counter(each.reason for each in findings if each.reason).most_common())
    record = {"data_digest": shards.digest, **ensemble.identity(), "images": total, "reasons": reasons}
    write_file(out / PAGE_NAME, page.encode())
    write_file(out / SUMMARY_NAME, json.dumps(record, indent=1).encode() + b"\n")
    write_file(out / TABLE_NAME, csv_bytes(COLUMNS, _rows(findings)))
    return AuditCounts(images=total, reasons=reasons)


def find(samples: Sequence[Sample], shards: ShardSet, report: Report) -> list[Finding]:
    """Measure the masks of all samples of a set in threads, and rank them."""
    from isicdist.audit.findings import rank
    from isicdist.audit.measures import Confidence, Measures, measure, probability_histograms

    def histograms(sample: Sample) -> np.ndarray:
        return probability_histograms(sample.mask(), sample.levels)

    def measure_and_hash(sample: Sample) -> tuple[Measures, bytes]:
        mask = sample.mask()
        digest = hashlib.sha256(np.packbits(mask).tobytes()).digest() if mask.any() and not mask.all() else b""
        return measure(mask, sample.levels, confidence), digest

    with ThreadPoolExecutor(launch.worker_threads()) as pool:
        total = np.zeros((2, 256), np.int64)
        for counts in pool.map(histograms, samples):
            total += counts
        confidence = Confidence.of(total)
        measured: list[tuple[Measures, bytes]] = []
        for done, result in enumerate(pool.map(measure_and_hash, samples), start=1):
            measured.append(result)
            report(done, len(samples), "measure")
    return rank(
        [sample.key for sample in samples],
        [sample.split_name for sample in samples],
        [each for each, _ in measured],
        mask_hashes=[digest for _, digest in measured],
        twins=_twins(samples, shards),
    )


def _twins(samples: Sequence[Sample], shards: ShardSet) -> Iterator[TwinMasks]:
    """Compare the masks of the duplicate images of a set."""
    from isicdist.audit.findings import TwinMasks
    from isicdist.audit.measures import dice_of_masks

    by_key = {sample.key: sample for sample in samples}
    for duplicate in read_duplicates(shards):
        first, second = (by_key[key].mask() for key in (duplicate.key, duplicate.duplicate_of))
        yield TwinMasks(key=duplicate.key, duplicate_of=duplicate.duplicate_of, dice=dice_of_masks(first, second))


def _rows(findings: Sequence[Finding]) -> Iterator[tuple[str, ...]]:
    """Give the rows of audit.csv; the verdict is empty."""
    for number, each in enumerate(findings, start=1):
        scores = (f"{each.measures.dice:.4f}", f"{each.measures.expected_dice:.4f}")
        yield (str(number), each.key, each.split, f"{each.score:.3f}", each.reason, each.detail, *scores, "")
