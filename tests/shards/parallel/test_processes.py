"""The parallel map: results in order, bounded lookahead, progress, and workers that fail or die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from shards.errors import ToolkitError
from shards.parallel import processes
from shards.parallel.processes import Advance, results_in_order, run_parallel


def slow_first(part: int, shared: str, advance: Advance) -> tuple[str, int, int]:
    """The first part takes the longest, so that the others overtake it."""
    time.sleep(0.2 if part == 0 else 0)
    for _ in range(part):
        advance()
    return shared, part, os.getpid()


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_the_parts_and_every_item_is_reported(workers: int):
    reports: list[int] = []
    with run_parallel(slow_first, range(6), "shared", workers=workers, report=reports.append) as results:
        found = list(results)
    assert [(shared, part) for shared, part, _ in found] == [("shared", part) for part in range(6)]
    assert ({process for *_, process in found} == {os.getpid()}) == (workers == 1)
    assert reports == sorted(reports)
    assert reports[-1] == sum(range(6))


def test_no_more_parts_are_in_flight_than_the_lookahead():
    submitted: list[int] = []

    with ThreadPoolExecutor(1) as pool:

        def submit(part: int) -> Future[int]:
            submitted.append(part)
            return pool.submit(int, part)

        results = results_in_order(submit, range(10), 3, poll=lambda: None)
        assert submitted == [0, 1, 2]
        for done in range(10):
            assert next(results) == done
            assert len(submitted) == min(10, done + 4)


def test_parts_in_flight_are_cancelled_when_the_results_are_no_longer_wanted():
    futures: list[Future[int]] = []

    def submit(part: int) -> Future[int]:
        futures.append(Future())
        if part == 0:
            futures[-1].set_result(part)
        return futures[-1]

    results = results_in_order(submit, range(10), 3, poll=lambda: None)
    assert next(results) == 0
    results.close()
    assert [future.cancelled() for future in futures] == [False, True, True, True]


def fails_at_three(part: int, shared: None, advance: Advance) -> int:
    if part == 3:
        raise ToolkitError("part 3 is bad")
    return part


def dies_at_three(part: int, shared: None, advance: Advance) -> int:
    if part == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return part


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_part_is_raised_in_its_turn(workers: int):
    found: list[int] = []
    with (
        pytest.raises(ToolkitError, match="part 3 is bad"),
        run_parallel(fails_at_three, range(9), None, workers=workers, report=lambda done: None) as results,
    ):
        found.extend(results)
    assert found == [0, 1, 2]


def test_a_worker_that_is_killed_is_an_error_with_a_way_out():
    with (
        pytest.raises(ToolkitError, match=r"a worker process was killed.*with fewer --workers"),
        run_parallel(dies_at_three, range(9), None, workers=2, report=lambda done: None) as results,
    ):
        list(results)


def dies_with_the_lock(part: int, shared: None, advance: Advance) -> int:
    assert processes._worker
    processes._worker[1].get_lock().acquire()
    return dies_at_three(3, shared, advance)


@pytest.mark.timeout(30)
def test_a_worker_that_is_killed_while_it_counts_does_not_stop_the_count():
    reports: list[int] = []
    with (
        pytest.raises(ToolkitError, match="a worker process was killed"),
        run_parallel(dies_with_the_lock, range(9), None, workers=2, report=reports.append) as results,
    ):
        list(results)
    assert set(reports) == {0}


FEW_FILES = """
import resource
from shards.errors import ToolkitError
from shards.parallel.processes import run_parallel

resource.setrlimit(resource.RLIMIT_NOFILE, (14, 14))
try:
    with run_parallel(max, [1], 2, workers=3, report=print):
        pass
except ToolkitError as error:
    print(error)
"""


def test_workers_of_which_one_cannot_be_started_are_ended_and_the_limit_is_named():
    done = subprocess.run([sys.executable, "-c", FEW_FILES], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("3 worker processes cannot be started (Too many open files); raise the limit of open")
