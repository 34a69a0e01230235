"""Work in parallel processes that end with their parent, its results in the order of the parts."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from shards.errors import ToolkitError

AHEAD = 8  # parts per process that are handed out before their turn; bounds what waits in memory

Tick = Callable[[], None]
"""Called after each item of a part."""
Work = Callable[[Any, Any, Tick], Any]
"""Called with a part, what all parts share, and a function to call after each item of the part."""


@contextmanager
def run_parallel(
    work: Work, parts: Iterable[Any], shared: Any, *, workers: int, report: Callable[[int], None]
) -> Iterator[Iterator[Any]]:
    """The results of work(part, shared, tick) for each part, in order; `report` is told the number of items done.

    With more than one worker the processes have started when the block begins, and they share what had been
    imported and opened until then. `work` is a function of a module. Raises ToolkitError when a process is killed.
    """
    if workers == 1:
        yield _one_by_one(work, parts, shared, report)
        return
    gc.freeze()  # what is here now, or every collection in a process would write to its pages, and so copy them
    context = multiprocessing.get_context("fork")
    counter = context.Value("Q", 0)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(shared, counter))

    def submit(part: Any) -> Future[Any]:
        return pool.submit(_in_worker, work, part)

    try:
        yield results_in_order(submit, parts, AHEAD * workers, lambda: report(counter.value))
    except BrokenProcessPool as error:
        raise ToolkitError(
            "a worker process was killed, perhaps for want of memory; run the same command again, "
            "with fewer --workers: shards that are done are kept"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
        gc.unfreeze()


def results_in_order(
    submit: Callable[[Any], Future[Any]], parts: Iterable[Any], ahead: int, beat: Callable[[], None] = lambda: None
) -> Iterator[Any]:
    """The results of the parts, in order; `ahead` of them are handed out at a time, the first ones at once.

    `beat` is called now and then meanwhile.
    """
    rest = iter(parts)
    waiting = deque(submit(part) for part in itertools.islice(rest, ahead))

    def results() -> Iterator[Any]:
        try:
            while waiting:
                while wait([waiting[0]], timeout=0.2).not_done:
                    beat()
                beat()
                future = waiting.popleft()
                waiting.extend(submit(part) for part in itertools.islice(rest, 1))
                yield future.result()
        finally:
            for future in waiting:
                future.cancel()

    return results()


def _one_by_one(work: Work, parts: Iterable[Any], shared: Any, report: Callable[[int], None]) -> Iterator[Any]:
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        report(done)

    for part in parts:
        yield work(part, shared, tick)


_worker: tuple[Any, Any] | None = None  # set once in each worker process, by the fork


def _begin(shared: Any, counter: Any) -> None:
    """Prepare a worker process: Ctrl-C is the parent's to handle, and the worker ends with its parent."""
    global _worker
    _worker = (shared, counter)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _in_worker(work: Work, part: Any) -> Any:
    assert _worker is not None
    shared, counter = _worker

    def tick() -> None:
        with counter.get_lock():
            counter.value += 1

    return work(part, shared, tick)
