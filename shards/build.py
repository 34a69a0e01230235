"""Build a shard set: pair the inputs, encode the pairs in parallel, find duplicates, plan and write shards and index.

A build that was killed resumes when it is run again: DIR/.build holds what is done (`shards.writing.stages`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shards import format
from shards.errors import SourceError, UsageError
from shards.exclusions import read_excluded
from shards.format import Index
from shards.inputs.match import EXCLUDED, BadInputError, Pairing, exclude_pairs, pair_files
from shards.inputs.source import File, Source, archives_in, files_outside, open_sources
from shards.parallel.dask import connect
from shards.parallel.processes import available_cores
from shards.planning.duplicates import merge_groups
from shards.planning.plan import (
    BuildOptions,
    check_groups,
    check_not_empty,
    digest_of_files,
    plan_shards,
    split_into_parts,
    split_warnings,
    splits_by_hash,
)
from shards.planning.split import read_groups, read_split_file, split_of_source
from shards.progress import Report, no_report
from shards.writing.index import publish_index
from shards.writing.job import PLAN, Job
from shards.writing.records import RECORDS_VERSION, read_record, write_record
from shards.writing.stages import Stages
from shards.writing.target import Target, open_target, read_bytes


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """A complete shard set."""

    location: str
    """Path or URL of the set."""
    index: Index
    already_complete: bool
    """The set was complete before this build, which changed nothing, and found nothing out for the fields below."""
    grouped: int | None = None
    """Number of packed pairs that the table of groups names; None without one."""
    excluded: Mapping[str, int] = field(default_factory=dict[str, int])
    """Number of excluded pairs by the split that they would be in, as far as it is known."""
    warnings: Sequence[str] = ()
    """Descriptions of what makes the splits uneven, a line each (`shards.planning.plan.split_warnings`)."""


def build(
    images: str | Sequence[str],
    masks: str | Sequence[str],
    out: str | Path,
    options: BuildOptions | None = None,
    *,
    workers: int | None = None,
    scheduler: str | None = None,
    allow_empty_masks: bool = False,
    report: Report = no_report,
) -> BuildResult:
    """Pack images and masks (paths or URLs of their sources, which may be the same) into a shard set at `out`.

    Several sources of images, or of masks, are read as one.

    The bytes depend on inputs and options only. The work is done by `workers` processes (None: one for each core), or
    by the Dask cluster whose scheduler has the address `scheduler`. `allow_empty_masks`: build a set without any
    lesion. `report` is called with the progress.

    Raises SourceError when the sources have no pair or no lesion, or a split gets no pair, BadInputError when inputs
    are bad and `options.on_bad_input` is fail (`out` is left empty in all these cases), UsageError when `out` holds
    something else, ToolkitError when a worker is lost, OSError when a file cannot be written.
    """
    options = options or BuildOptions()
    if scheduler and workers is not None:
        raise UsageError("--workers and --scheduler: give one of the two; a cluster brings workers of its own")
    workers = available_cores() if workers is None else workers
    if workers < 1:
        raise UsageError(f"--workers {workers}: give 1 or more")
    if scheduler:  # its workers have working directories of their own
        (out,) = _absolute([str(out)])
    image_locations, mask_locations = (
        _absolute(given) if scheduler else given
        for given in ([each] if isinstance(each, str) else list(each) for each in (images, masks))
    )
    target = open_target(out)
    sources, files = open_sources([*image_locations, *mask_locations])
    files = files_outside(target.location, sources, files)
    masks_only = {each for location in mask_locations for each in archives_in(location)}
    masks_only -= {each for location in image_locations for each in archives_in(location)}
    try:
        mask_sources = {number for number, source in enumerate(sources) if source.location in masks_only}
        inputs = _read_inputs(sources, files, mask_sources, options)
        built = {**options.to_json(), "inputs": digest_of_files(files, with_times=False)}
        result = _already_complete(target, built)
        if result is None:
            identity = {**built, "times": digest_of_files(files, with_times=True), "records": RECORDS_VERSION}
            job = Job(target=target, sources=sources, options=options, identity=identity)
            with connect(scheduler) if scheduler else nullcontext() as cluster, target.lock():
                result = _already_complete(target, built)  # another build may have ended since
                if result is None:
                    stages = Stages(job=job, workers=workers, cluster=cluster, report=report)
                    with _begun(target, identity):
                        result = _build(stages, inputs, built, allow_empty_masks=allow_empty_masks)
    finally:
        for source in sources:
            source.close()
    target.clear_work()  # here, too, for a build that was killed just before its end
    return result


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """The pairs of a build, with what its tables and the names of its archives say of them."""

    pairing: Pairing
    """Without the pairs that are excluded, which it lists as rejected."""
    grouped: Collection[str]
    """Keys that the table of groups names."""
    split_table: dict[str, str]
    """Split of each pair by key, from a file or from the archives; empty where a hash decides."""
    excluded: dict[str, int]
    """Number of excluded pairs by the split that they would be in."""


def _read_inputs(
    sources: Sequence[Source], files: list[File], mask_sources: Collection[int], options: BuildOptions
) -> _Inputs:
    """Pair the files, and read the tables that the options name. Raises SourceError, UsageError."""
    found = pair_files(files, options.mask_suffix, mask_sources)
    grouped = read_groups(options.groups, [pair.key for pair in found.pairs]) if options.groups else {}
    if grouped:
        pairs = [replace(pair, group=grouped.get(pair.key, pair.key)) for pair in found.pairs]
        found = replace(found, pairs=pairs)
    pairing = found
    if options.exclude:
        pairing = exclude_pairs(found, read_excluded(Path(options.exclude)), options.exclude)
    kept = {pair.key for pair in pairing.pairs}
    out = [pair for pair in found.pairs if pair.key not in kept]
    split_table: dict[str, str] = {}
    if options.split_file:
        keys = (pair.key for pair in pairing.pairs)
        split_table = read_split_file(options.split_file, keys, optional=[pair.key for pair in out])
    elif options.split_archives:
        split_table = {pair.key: split_of_source(sources[pair.image.source].location) for pair in found.pairs}
    splits = split_table or splits_by_hash(out, {}, options)
    excluded = Counter(splits[pair.key] for pair in out if pair.key in splits)
    split_table = {key: split for key, split in split_table.items() if key in kept}
    if split_table:
        check_groups(pairing.pairs, split_table, options)
    return _Inputs(pairing=pairing, grouped=grouped.keys(), split_table=split_table, excluded=dict(excluded))


def _build(stages: Stages, inputs: _Inputs, built: dict[str, Any], *, allow_empty_masks: bool) -> BuildResult:
    """Encode the pairs, find duplicates, plan and write the shards, publish the index."""
    options, pairing, split_table = stages.job.options, inputs.pairing, inputs.split_table
    fail = options.on_bad_input == "fail"
    bad_names = [row for row in pairing.rejected if row.reason != EXCLUDED]

    # 1. Encode every pair, in the order of a plan that knows no duplicates yet.
    first_splits = split_table or splits_by_hash(pairing.pairs, {}, options)
    if not (fail and bad_names):  # or an empty split would be reported before the bad inputs
        check_not_empty(pairing.pairs, first_splits, options, split_table)
    first_shards = plan_shards(pairing.pairs, first_splits, options)
    encoded = stages.encode(split_into_parts(first_shards, options, encoding_pass=0))
    rejected = sorted(pairing.rejected + encoded.rejected, key=lambda row: row.path)
    bad = [row for row in rejected if row.reason != EXCLUDED]
    if bad and (fail or not encoded.hashes):
        raise BadInputError(bad)
    if not encoded.with_lesion and not allow_empty_masks:
        raise SourceError(
            f"all {len(encoded.hashes)} masks are empty: is --masks the right place? --allow-empty-masks builds them"
        )

    # 2. Duplicates stay in one split, unless a split file says otherwise.
    good = [pair for pair in pairing.pairs if pair.key in encoded.hashes]
    duplicates = stages.find_duplicates(good, encoded)
    if split_table:
        splits = {pair.key: split_table[pair.key] for pair in good}
    else:
        merged = merge_groups({pair.key: pair.group for pair in good}, duplicates)
        splits = splits_by_hash(good, merged, options)
    check_not_empty(good, splits, options, split_table)

    # 3. Encode again the few pairs that duplicates moved to a split that keeps the original masks.
    shards = plan_shards(good, splits, options)
    moved = [
        pair
        for pair in good
        if options.keeps_original(splits[pair.key]) and not options.keeps_original(first_splits[pair.key])
    ]
    moved_shards = plan_shards(moved, splits, options)
    moved_to = stages.encode_again(split_into_parts(moved_shards, options, encoding_pass=1))

    # 4. Assemble the shards, and publish the index.
    records = stages.write_shards(shards, {**encoded.part_of, **moved_to})
    target = stages.job.target
    return BuildResult(
        location=target.location,
        index=publish_index(target, built, pairing, records, rejected, duplicates),
        already_complete=False,
        grouped=sum(pair.key in inputs.grouped for pair in good) if options.groups else None,
        excluded=inputs.excluded,
        warnings=() if split_table else split_warnings(good, splits, options),
    )


def _absolute(locations: Sequence[str]) -> list[str]:
    return [location if "://" in location else str(Path(location).absolute()) for location in locations]


def _already_complete(target: Target, built: dict[str, Any]) -> BuildResult | None:
    """Read the index of a complete set; None where there is none yet. Raises UsageError for that of another build."""
    if not target.exists(format.INDEX_NAME):
        return None
    index = Index.parse(read_bytes(target, format.INDEX_NAME), f"{target.location}/{format.INDEX_NAME}")
    _check_same_build(target, index.built, built)
    return BuildResult(location=target.location, index=index, already_complete=True)


def _check_same_build(target: Target, existing: Mapping[str, Any], requested: Mapping[str, Any]) -> None:
    """Raise UsageError that names the differences between the build in the target and the requested one."""
    names = [name for name in sorted(existing.keys() | requested.keys()) if existing.get(name) != requested.get(name)]
    if not names:
        return
    opaque = {"inputs": "the input files", "times": "the input files' times of change"}
    differences = [
        opaque.get(name) or f"{name} ({existing.get(name)} there, {requested.get(name)} here)" for name in names
    ]
    raise UsageError(
        f"{target.location}: holds another build; it differs in {', '.join(differences)}; "
        "give another --out or remove it"
    )


@contextmanager
def _begun(target: Target, identity: dict[str, Any]) -> Generator[None]:
    """Start a build or resume it, for a block. A SourceError in the block, before any shard, deletes what it has done.

    Raises UsageError when the target holds other files.
    """
    if target.exists(PLAN):
        _check_same_build(target, read_record(target, PLAN), identity)
    elif target.has_foreign_files():
        target.clear_work()
        raise UsageError(
            f"{target.location}: holds files that are no shard set; give a new or an empty folder for --out"
        )
    write_record(target, PLAN, identity)
    try:
        yield
    except SourceError:
        target.clear_work()
        raise
