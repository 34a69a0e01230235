"""Keep two builds out of one URL: an object store has no locks, but most can create an object only if there is none.

The claim of a build is an object that says who it is, renewed every `RENEWAL` seconds. One that has not changed for
`STALE` seconds is that of a build that was killed, and is taken over; nobody's clock is compared. Where a store cannot
create on condition (fsspec's default looks first and then writes), two builds that start at the same moment both pass.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from typing import Protocol

import psutil

from shards.errors import ToolkitError, UsageError

RENEWAL = 2.0
"""Seconds between two renewals of a claim."""
STALE = 15.0
"""Seconds without a renewal after which a claim is taken over."""


class Store(Protocol):
    """The object that a claim is, in a place that several machines reach. Its methods raise ToolkitError."""

    def create(self, data: bytes) -> bool:
        """Create the object; False if there is one."""
        ...

    def read(self) -> bytes | None:
        """Read the object; None if there is none."""
        ...

    def write(self, data: bytes) -> None:
        """Write the object, over the one that is there."""
        ...

    def delete(self) -> None:
        """Delete the object."""
        ...


@contextmanager
def claimed(store: Store, location: str) -> Generator[None]:
    """Hold the claim of `location` for a block. Raises UsageError when another build holds it, and renews it."""
    ours = uuid.uuid4().hex
    while not store.create(_claim(ours, 0)):
        _wait_until_stale(store, location)
        store.delete()
    ended = threading.Event()
    renewing = threading.Thread(target=_renew, args=(store, ours, ended), name="claim", daemon=True)
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()
        if _is_ours(store.read(), ours):
            store.delete()


def _claim(identity: str, renewals: int) -> bytes:
    return f"process {os.getpid()} on {socket.gethostname()}; {identity}; renewed {renewals} times\n".encode()


def _is_ours(claim: bytes | None, identity: str) -> bool:
    return claim is not None and identity.encode() in claim


def _renew(store: Store, identity: str, ended: threading.Event) -> None:
    renewals = 0
    while not ended.wait(RENEWAL):
        renewals += 1
        try:
            if not _is_ours(store.read(), identity):
                return  # taken over, after a long pause; that build writes the same bytes, or is refused by its plan
            store.write(_claim(identity, renewals))
        except ToolkitError:
            continue  # the next renewal may pass; a store that is gone ends the build itself


def _wait_until_stale(store: Store, location: str) -> None:
    """Return when the claim is gone or that of a build that was killed. Raises UsageError for one that is at work."""
    first = store.read()
    if first is None:
        return
    holder = first.decode(errors="replace").partition(";")[0]
    end = time.monotonic() + STALE
    while time.monotonic() < end and not _ended_here(holder):
        time.sleep(RENEWAL / 5)
        claim = store.read()
        if claim is None:
            return
        if claim != first:
            raise UsageError(
                f"{location}: another build is at work there ({holder}); wait for its end or give another --out"
            )


def _ended_here(holder: str) -> bool:
    """Whether the holder, "process 7 on node", was a process of this machine that has ended."""
    match = re.fullmatch(rf"process (\d+) on {re.escape(socket.gethostname())}", holder)
    return match is not None and not psutil.pid_exists(int(match[1]))
