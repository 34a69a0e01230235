"""Ordered parallel map over worker processes that end with their parent."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar

from shards.errors import ToolkitError
from shards.parallel.malloc import retain_freed_memory

LOOKAHEAD = 8  # parts per process that are submitted before their turn; bounds the results held in memory
POLL_SECONDS = 0.2  # between two reports while a result is awaited

Part = TypeVar("Part")
Shared = TypeVar("Shared")
Result = TypeVar("Result")

Advance: TypeAlias = Callable[[], None]
"""Called by the work after each item of a part: advances the progress."""
Work: TypeAlias = Callable[[Part, Shared, Advance], Result]
"""Function of a part, the object that all parts share, and `Advance`."""


def available_cores() -> int:
    """Count the cores that this process may run on: its CPU affinity where the system has one, else all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def run_parallel(
    work: Work[Part, Shared, Result],
    parts: Iterable[Part],
    shared: Shared,
    *,
    workers: int,
    report: Callable[[int], None],
) -> Generator[Iterator[Result]]:
    """Start `workers` processes and yield the results of work(part, shared, advance), in the order of the parts.

    With more than one worker the processes are forked when the block begins, so they share all that is imported and
    opened by then; with one, the work is done in this process. `work` is a module-level function; `report` is called
    with the number of items done. Raises ToolkitError when a process cannot be started, or is killed.
    """
    if workers == 1:
        yield _run_serially(work, parts, shared, report)
        return
    gc.freeze()  # or each collection in a worker would write to the pages of these objects, and so copy them
    context = multiprocessing.get_context("fork")
    counter = context.Value("Q", 0)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_init_worker, initargs=(shared, counter))

    def submit(part: Part) -> Future[Result]:
        return pool.submit(_run_in_worker, work, part)

    def report_done() -> None:
        report(counter.get_obj().value)  # without its lock, which a worker that was killed may hold for ever

    try:
        with _all_or_none(workers):
            results = results_in_order(submit, parts, LOOKAHEAD * workers, poll=report_done)
        yield results
    except BrokenProcessPool as error:
        raise ToolkitError(
            "a worker process was killed, perhaps for want of memory; run the same command again, "
            "with fewer --workers: shards that are done are kept"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
        gc.unfreeze()


@contextmanager
def _all_or_none(workers: int) -> Generator[None]:
    """Start the processes of a pool within: when one cannot be, those before it are killed. Raises ToolkitError."""
    others = multiprocessing.active_children()
    try:
        yield
    except OSError as error:
        for process in multiprocessing.active_children():
            if process not in others:
                process.kill()  # the pool would wait for it for ever
        raise ToolkitError(
            f"{workers} worker processes cannot be started ({error.strerror}); "
            "raise the limit of open files or processes (ulimit -n, ulimit -u), or give fewer --workers"
        ) from error


def results_in_order(
    submit: Callable[[Part], Future[Result]], parts: Iterable[Part], lookahead: int, *, poll: Callable[[], None]
) -> Generator[Result]:
    """Submit the parts and return a generator of their results, in the order of the parts.

    `lookahead` parts are in flight at a time, the first of them at once. `poll` is called every POLL_SECONDS while a
    result is awaited, and before each result. The parts in flight are cancelled when the generator is closed.
    """
    remaining = iter(parts)
    in_flight = deque(submit(part) for part in itertools.islice(remaining, lookahead))

    def results() -> Generator[Result]:
        try:
            while in_flight:
                while wait([in_flight[0]], timeout=POLL_SECONDS).not_done:
                    poll()
                poll()
                future = in_flight.popleft()
                in_flight.extend(submit(part) for part in itertools.islice(remaining, 1))
                yield future.result()
        finally:
            for future in in_flight:
                future.cancel()

    return results()


def _run_serially(
    work: Work[Part, Shared, Result], parts: Iterable[Part], shared: Shared, report: Callable[[int], None]
) -> Iterator[Result]:
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        report(done)

    for part in parts:
        yield work(part, shared, advance)


_worker: tuple[Any, Any] | None = None  # (shared, counter), set once in each worker process


def _init_worker(shared: Any, counter: Any) -> None:
    """Initialise a worker process: Ctrl-C is the parent's to handle, and the worker exits with its parent."""
    global _worker
    retain_freed_memory()
    _worker = (shared, counter)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def _run_in_worker(work: Work[Part, Any, Result], part: Part) -> Result:
    assert _worker is not None
    shared, counter = _worker

    def advance() -> None:
        with counter.get_lock():
            counter.value += 1

    return work(part, shared, advance)
