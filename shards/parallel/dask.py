"""Ordered parallel map over the workers of a running Dask cluster.

Every worker needs to read the sources and to write the set under the names that this process uses (a shared folder,
URLs), and to have the same versions of the packages that decide the bytes.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

from shards.errors import ToolkitError, UsageError
from shards.parallel.processes import LOOKAHEAD, Part, Result, Work, results_in_order

if TYPE_CHECKING:
    from distributed import Client

CONNECT_SECONDS = 8  # timeout for the scheduler to answer, and for a first worker to be there
PACKAGES = ("isicdist", "numpy", "pillow", "simplejpeg")
"""Packages whose versions decide the bytes of a set."""


class Shareable(Protocol):
    """Object that all parts share; it is pickled and sent to the workers."""

    def check_access(self) -> None:
        """Raise ToolkitError when this machine does not see the sources or the set that is built."""
        ...

    def close(self) -> None:
        """Close the files that this process has opened."""
        ...


Shared = TypeVar("Shared", bound=Shareable)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Connection to a running Dask cluster."""

    address: str
    """Address of the scheduler."""
    client: Client

    def map_ordered(
        self,
        work: Work[Part, Shared, Result],
        parts: Iterable[Part],
        shared: Shared,
        report: Callable[[int], None],
    ) -> Iterator[Result]:
        """Yield the results of work(part, shared, advance), in the order of the parts.

        `report` is called with the number of items done. Raises ToolkitError when a worker cannot do its part or the
        cluster is lost.
        """
        from distributed import KilledWorker

        versions, done = _versions(), 0
        executor = self.client.get_executor(pure=False)
        threads = sum(cast(dict[str, int], self.client.nthreads()).values())

        def submit(part: Part) -> Future[tuple[int, Result]]:
            return executor.submit(_run_on_worker, work, part, shared, versions)

        try:
            for items, result in results_in_order(submit, parts, LOOKAHEAD * threads, poll=self._check_connected):
                done += items
                report(done)
                yield result
        except CancelledError as error:
            raise self._lost_error() from error
        except KilledWorker as error:
            raise ToolkitError(
                f"--scheduler {self.address}: workers die of a part, perhaps for want of memory; give them more "
                "and run the same command again: what is done is kept"
            ) from error

    def _check_connected(self) -> None:
        """Raise ToolkitError when the scheduler is lost, whose futures Dask would wait for for ever."""
        if self.client.status != "running":
            raise self._lost_error()

    def _lost_error(self) -> ToolkitError:
        return ToolkitError(
            f"--scheduler {self.address}: the scheduler is gone; "
            "run the same command again when it is back: what is done is kept"
        )


@contextmanager
def connect(address: str) -> Generator[Cluster]:
    """Connect to the cluster whose scheduler answers at an address such as tcp://host:8786.

    Raises UsageError for what is no address and when Dask is not installed, ToolkitError when no scheduler answers or
    it has no worker.
    """
    if not re.fullmatch(r"(\w+://)?.+:\d+/?", address):
        raise UsageError(f"--scheduler {address}: give the address of a Dask scheduler, as tcp://host:8786")
    try:
        from distributed import Client
        from distributed.utils import silence_logging_cmgr
    except ImportError as error:
        raise UsageError(f"--scheduler {address}: Dask is not installed; pip install 'isicdist[cluster]'") from error
    with silence_logging_cmgr(logging.CRITICAL):  # failures are reported by the errors below, in one line
        try:
            client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError) as error:
            raise ToolkitError(
                f"--scheduler {address}: no Dask scheduler answers there; start one with: dask scheduler"
            ) from error
        with client:
            try:
                client.wait_for_workers(1, timeout=CONNECT_SECONDS)
            except TimeoutError as error:
                raise ToolkitError(
                    f"--scheduler {address}: it has no worker; start some with: dask worker {address}"
                ) from error
            yield Cluster(address=address, client=client)


def _run_on_worker(
    work: Work[Part, Shared, Result], part: Part, shared: Shared, versions: dict[str, str]
) -> tuple[int, Result]:
    """Run one part on a worker; the number of its items, and its result."""
    if (installed := _versions()) != versions:
        differing = [name for name in PACKAGES if installed[name] != versions[name]]
        listed = ", ".join(f"{name} {installed[name]}, not {versions[name]}" for name in differing)
        raise ToolkitError(f"a worker of the cluster has {listed}: its bytes would differ; install the same versions")
    items = 0

    def advance() -> None:
        nonlocal items
        items += 1

    try:
        shared.check_access()
        result = work(part, shared, advance)
    finally:
        shared.close()
    return items, result


def _versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}
