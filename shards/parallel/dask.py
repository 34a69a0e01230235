"""Hand the parts of a build to a running Dask cluster: the same work, and so the same bytes, on other machines.

Every worker needs to read the sources and to write the set under the names that this process uses (a shared folder,
URLs), and the versions of the packages that decide the bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Protocol, cast

from shards.errors import ToolkitError, UsageError
from shards.parallel.processes import AHEAD, Work, results_in_order

if TYPE_CHECKING:
    from distributed import Client

SECONDS = 8  # for the scheduler to answer, and for a first worker to be there
PACKAGES = ("isicdist", "numpy", "pillow", "simplejpeg")


class Shared(Protocol):
    """What all parts share; it is sent to the workers."""

    def check_here(self) -> None:
        """Raise ToolkitError when this machine does not see the sources or the set that is built."""
        ...

    def close(self) -> None:
        """Close what this process has opened."""
        ...


@dataclass(frozen=True)
class Cluster:
    """A running Dask cluster."""

    address: str
    client: Client

    def in_order(
        self, work: Work, parts: Iterable[Any], shared: Shared, report: Callable[[int], None]
    ) -> Iterator[Any]:
        """The results of work(part, shared, tick) for each part, in order; `report` is told the number of items done.

        Raises ToolkitError when a worker cannot do it or the cluster is lost.
        """
        from distributed import KilledWorker

        versions, done = _versions(), 0
        executor = self.client.get_executor(pure=False)
        threads = sum(cast(dict[str, int], self.client.nthreads()).values())

        def submit(part: Any) -> Future[Any]:
            return executor.submit(_on_worker, work, part, shared, versions)

        try:
            for ticks, result in results_in_order(submit, parts, AHEAD * threads, self._check):
                done += ticks
                report(done)
                yield result
        except CancelledError as error:
            raise self._gone() from error
        except KilledWorker as error:
            raise ToolkitError(
                f"--scheduler {self.address}: workers die of a part, perhaps for want of memory; give them more "
                "and run the same command again: what is done is kept"
            ) from error

    def _check(self) -> None:
        """Dask lets the futures of a scheduler that has died wait for ever."""
        if self.client.status != "running":
            raise self._gone()

    def _gone(self) -> ToolkitError:
        return ToolkitError(
            f"--scheduler {self.address}: the scheduler is gone; "
            "run the same command again when it is back: what is done is kept"
        )


@contextmanager
def connected(address: str) -> Iterator[Cluster]:
    """The cluster whose scheduler answers at an address such as tcp://host:8786.

    Raises UsageError when Dask is not installed, ToolkitError when no scheduler answers or it has no worker.
    """
    try:
        from distributed import Client
        from distributed.utils import silence_logging_cmgr
    except ImportError as error:
        raise UsageError(f"--scheduler {address}: Dask is not installed; pip install 'isicdist[cluster]'") from error
    with silence_logging_cmgr(logging.CRITICAL):  # what goes wrong is said here, in one line
        try:
            client = Client(address, timeout=SECONDS, set_as_default=False)
        except (OSError, ValueError) as error:
            raise ToolkitError(
                f"--scheduler {address}: no Dask scheduler answers there; start one with: dask scheduler"
            ) from error
        with client:
            try:
                client.wait_for_workers(1, timeout=SECONDS)
            except TimeoutError as error:
                raise ToolkitError(
                    f"--scheduler {address}: it has no worker; start some with: dask worker {address}"
                ) from error
            yield Cluster(address, client)


def _on_worker(work: Work, part: Any, shared: Shared, versions: dict[str, str]) -> tuple[int, Any]:
    """How many items the part has, and its result."""
    if (here := _versions()) != versions:
        told = ", ".join(f"{name} {here[name]}, not {versions[name]}" for name in here if here[name] != versions[name])
        raise ToolkitError(f"a worker of the cluster has {told}: its bytes would differ; install the same versions")
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        ticks += 1

    try:
        shared.check_here()
        result = work(part, shared, tick)
    finally:
        shared.close()
    return ticks, result


def _versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}
