"""Build a shard set: find and pair, plan, pack the shards in parallel processes, publish the index last.

A build that was killed is completed by running it again: DIR/.build holds a record of every shard that is done.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shards import format
from shards.errors import SourceError, ToolkitError, UsageError
from shards.pack import WORK, ShardRecord, check_shard, pack_shard, publish, record_path
from shards.plan import BuildOptions, PlannedShard, digest_of_files, plan_shards
from shards.reader import ShardSet
from shards.source import BadInputError, Pairing, Rejected, Source, find, pair_files
from shards.split import parse_fractions, read_groups

PLAN = "plan.json"
Report = Callable[[int, int], None]
"""Called now and then with the number of pairs done and of all pairs."""


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """A complete shard set."""

    root: Path
    index: dict[str, Any]
    already: bool
    """It was complete before this build, which left it as it is."""


def build(
    images: str,
    masks: str,
    out: str | Path,
    options: BuildOptions | None = None,
    *,
    workers: int | None = None,
    report: Report = lambda done, total: None,
) -> BuildResult:
    """Pack the pairs of two places (paths or URLs; they may be one) into a shard set at `out`.

    The bytes depend on inputs and options only. Raises SourceError, BadInputError when inputs are bad and
    `options.on_bad_input` is fail (then nothing is left behind), UsageError when `out` holds something else.
    """
    options = options or BuildOptions()
    workers = _cores() if workers is None else workers
    if workers < 1:
        raise UsageError(f"--workers {workers}: give 1 or more")
    root = Path(out)
    sources, files = find([images, masks])
    pairing = pair_files(files, options.mask_suffix)
    groups = read_groups(options.groups, [pair.key for pair in pairing.pairs]) if options.groups else {}
    shards = plan_shards(pairing.pairs, groups, options)
    built = {**options.to_json(), "inputs": digest_of_files(files, with_times=False)}
    if (root / format.INDEX_NAME).exists():
        shard_set = ShardSet.open(root)
        _refuse_other(root, shard_set.index["built"], built)
        shutil.rmtree(root / WORK, ignore_errors=True)  # of a build that was killed just before its end
        return BuildResult(root=root, index=shard_set.index, already=True)

    made = _start(root, {**built, "times": digest_of_files(files, with_times=True)})
    run = _Run(root=root, sources=sources, options=options, workers=workers, report=report)
    try:
        if pairing.rejected and options.on_bad_input == "fail":
            found = run.check(shards)
            raise BadInputError(sorted(pairing.rejected + found, key=lambda row: row.path))
        records = run.pack(shards)
        bad = sorted(pairing.rejected + [r for record in records for r in record.rejected], key=lambda r: r.path)
        if bad and options.on_bad_input == "fail":
            raise BadInputError(bad)
        index = _finish(root, built, options, pairing, records, bad)
    except SourceError:
        _clear(root, shards, made)
        raise
    finally:
        for source in sources:
            source.close()
    return BuildResult(root=root, index=index, already=False)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _refuse_other(root: Path, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise UsageError that says what differs, unless the two builds are the same."""
    names = [name for name in sorted(there.keys() | wanted.keys()) if there.get(name) != wanted.get(name)]
    if not names:
        return
    opaque = {"inputs": "the input files", "times": "the input files' times of change"}
    told = [opaque.get(name) or f"{name} ({there.get(name)} there, {wanted.get(name)} here)" for name in names]
    raise UsageError(f"{root}: holds another build; it differs in {', '.join(told)}; give another --out or remove it")


def _start(root: Path, identity: dict[str, Any]) -> list[Path]:
    """Make the folder, or take up the build that was begun in it. Returns the folders made, the innermost first."""
    plan = root / WORK / PLAN
    if plan.exists():
        _refuse_other(root, json.loads(plan.read_bytes()), identity)
        for part in (root / WORK).glob("*.part"):
            part.unlink()
        return [root]
    if root.exists() and not root.is_dir():
        raise UsageError(f"{root}: a file is in the way; give a folder for --out")
    if root.is_dir() and any(path.name != WORK for path in root.iterdir()):
        raise UsageError(f"{root}: holds files that are no shard set; give a new or an empty folder for --out")
    made = [path for path in [root, *root.parents] if not path.exists()]
    (root / WORK).mkdir(parents=True, exist_ok=True)
    publish(root, plan, format.canonical_json(identity))
    return made


def _clear(root: Path, shards: list[PlannedShard], made: list[Path]) -> None:
    """Take away what this build made."""
    for split in {shard.split for shard in shards}:
        shutil.rmtree(root / split, ignore_errors=True)
    shutil.rmtree(root / WORK)
    for folder in made:
        if any(folder.iterdir()):  # another command's by now
            return
        folder.rmdir()


def _finish(
    root: Path,
    built: dict[str, Any],
    options: BuildOptions,
    pairing: Pairing,
    records: list[ShardRecord],
    rejected: list[Rejected],
) -> dict[str, Any]:
    """Publish the sample tables, the list of rejected inputs and, last, the index."""
    splits = {}
    flags: Counter[str] = Counter()
    for name in parse_fractions(options.split):
        mine = [record for record in records if record.name.startswith(f"{name}/") and record.samples]
        table = _table(mine)
        publish(root, root / format.table_name(name), table)
        entry = {
            "name": format.table_name(name),
            "bytes": len(table),
            "sha256": hashlib.sha256(table).hexdigest(),
        }
        shards = [{k: getattr(r, k) for k in ("name", "samples", "bytes", "sha256")} for r in mine]
        splits[name] = {"samples": sum(r.samples for r in mine), "table": entry, "shards": shards}
        for record in mine:
            flags.update(record.flags)
    publish(root, root / format.REJECTED_NAME, _csv(rejected))
    index = {
        "format": format.FORMAT,
        "version": format.VERSION,
        "size": options.size,
        "built": built,
        "counts": {
            "found": pairing.found,
            "packed": 2 * sum(record.samples for record in records),
            "rejected": len(rejected),
            "ignored": len(pairing.ignored),
            "flags": dict(sorted(flags.items())),
        },
        "splits": splits,
    }
    index["digest"] = format.digest_of(index)
    publish(root, root / format.INDEX_NAME, format.canonical_json(index))
    shutil.rmtree(root / WORK)
    return index


def _table(records: list[ShardRecord]) -> bytes:
    rows = [
        (key.encode(), shard, offset, sizes, crcs, height, width, foreground)
        for shard, record in enumerate(records)
        for key, offset, sizes, crcs, height, width, foreground in record.rows
    ]
    dtype = format.sample_dtype(max((len(row[0]) for row in rows), default=1))
    buffer = io.BytesIO()
    np.save(buffer, np.array(rows, dtype=dtype), allow_pickle=False)
    return buffer.getvalue()


def _csv(rejected: list[Rejected]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "reason", "detail"])
    writer.writerows([row.path, row.reason, row.detail] for row in rejected)
    return text.getvalue().encode()


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The work on the shards of one plan, here or in parallel processes."""

    root: Path
    sources: list[Source]
    options: BuildOptions
    workers: int
    report: Report

    def check(self, shards: list[PlannedShard]) -> list[Rejected]:
        """Find the bad pairs of all shards."""
        return [row for rows in self._each(_check, shards, sum(len(s.pairs) for s in shards), 0) for row in rows]

    def pack(self, shards: list[PlannedShard]) -> list[ShardRecord]:
        """Pack the shards that are not packed yet; the records of all of them, in the plan's order."""
        import webdataset.writer  # noqa: F401  once, before the fork: it costs each process more than a second

        records = {
            shard.name: ShardRecord.from_json(record_path(self.root, shard).read_bytes())
            for shard in shards
            if record_path(self.root, shard).exists()
        }
        missing = [shard for shard in shards if shard.name not in records]
        total = sum(len(shard.pairs) for shard in shards)
        done = total - sum(len(shard.pairs) for shard in missing)
        # The largest first, so that no process is left alone with a whole shard at the end.
        missing.sort(key=lambda shard: -len(shard.pairs))
        for record in self._each(_pack, missing, total, done):
            records[record.name] = record
        return [records[shard.name] for shard in shards]

    def _each(self, work: Callable[..., Any], shards: list[PlannedShard], total: int, done: int) -> Iterator[Any]:
        """Yield work(shard) for each shard, as they are done."""
        if self.workers == 1 or len(shards) <= 1:
            for shard in shards:
                yield work(shard, self, self._ticker(total, done))
                done += len(shard.pairs)
            return
        context = multiprocessing.get_context("fork")
        counter = context.Value("Q", done)
        pool = ProcessPoolExecutor(
            min(self.workers, len(shards)), mp_context=context, initializer=_begin, initargs=(self, counter)
        )
        try:
            waiting = {pool.submit(_in_worker, work, shard) for shard in shards}
            while waiting:
                ready, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                self.report(counter.value, total)
                for future in ready:
                    yield future.result()
        except BrokenProcessPool as error:
            raise ToolkitError(
                "a worker process was killed, perhaps for want of memory; run the same command again, "
                "with fewer --workers: shards that are done are kept"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)

    def _ticker(self, total: int, done: int) -> Callable[[], None]:
        def tick() -> None:
            nonlocal done
            done += 1
            self.report(done, total)

        return tick


def _pack(shard: PlannedShard, run: _Run, tick: Callable[[], None]) -> ShardRecord:
    return pack_shard(run.root, shard, run.sources, run.options, tick)


def _check(shard: PlannedShard, run: _Run, tick: Callable[[], None]) -> list[Rejected]:
    return check_shard(shard, run.sources, run.options, tick)


_worker: tuple[_Run, Any] | None = None  # set once in each worker process, by the fork


def _begin(run: _Run, counter: Any) -> None:
    """Prepare a worker process: Ctrl-C is the parent's to handle, and the worker ends with its parent."""
    global _worker
    _worker = (run, counter)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _in_worker(work: Callable[..., Any], shard: PlannedShard) -> Any:
    assert _worker is not None
    run, counter = _worker

    def tick() -> None:
        with counter.get_lock():
            counter.value += 1

    return work(shard, run, tick)
