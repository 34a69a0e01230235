"""Claims on a URL: one build holds one, a killed build's is taken over, and nobody deletes another's."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time

import pytest

from shards.errors import ToolkitError, UsageError
from shards.writing import claim
from shards.writing.claim import claimed


class Memory:
    """An object in memory that can be created on condition; the store behind it may be away for a while."""

    def __init__(self, data: bytes | None = None) -> None:
        self.data, self.away, self.lock = data, False, threading.Lock()

    def create(self, data: bytes) -> bool:
        with self.lock:
            created, self.data = self.data is None, self.data or data
        return created

    def read(self) -> bytes | None:
        if self.away:
            raise ToolkitError("away")
        return self.data

    def write(self, data: bytes) -> None:
        self.data = data

    def delete(self) -> None:
        self.data = None


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "RENEWAL", 0.05)
    monkeypatch.setattr(claim, "STALE", 0.5)


def test_a_second_build_is_refused_and_a_later_one_is_not():
    store = Memory()
    with claimed(store, "s3://bucket/set"):
        with (
            pytest.raises(UsageError, match=r"s3://bucket/set: another build is at work there \(process \d+ on "),
            claimed(store, "s3://bucket/set"),
        ):
            pass
        assert store.data
    assert store.data is None
    with claimed(store, "s3://bucket/set"):
        pass


@pytest.mark.parametrize("content", [b"process 1 on another-host; 0; renewed 3 times\n", b"", b"\xff{torn"])
def test_a_claim_that_nobody_renews_is_taken_over_in_the_end(content: bytes):
    store, begun = Memory(content or b" "), time.monotonic()
    with claimed(store, "here"):
        assert time.monotonic() - begun >= claim.STALE


def test_a_claim_of_a_process_here_that_has_ended_is_taken_over_at_once():
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    pid, begun = int(ended.stdout), time.monotonic()
    with claimed(Memory(f"process {pid} on {socket.gethostname()}; 0; renewed 3 times\n".encode()), "here"):
        assert time.monotonic() - begun < claim.STALE


def test_renewals_survive_an_outage_and_end_when_another_has_taken_over():
    store = Memory()
    with claimed(store, "here"):
        store.away = True
        time.sleep(0.15)
        store.away = False
        time.sleep(0.15)
        assert b"renewed 0" not in (store.data or b"renewed 0")
        store.data = b"another's"
        time.sleep(0.15)  # the next renewal sees it
    assert store.data == b"another's"


def test_of_many_that_start_together_one_builds():
    store, inside, refused = Memory(), [], []
    start = threading.Barrier(8)

    def attempt() -> None:
        start.wait()
        try:
            with claimed(store, "here"):
                inside.append(1)
                time.sleep(1)
        except UsageError:
            refused.append(1)

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(inside), len(refused)) == (1, 7)
