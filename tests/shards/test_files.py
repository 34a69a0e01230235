"""Locks of folders: held by one process, given back without a trace, and left out where there are none."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from shards.errors import UsageError
from shards.files import FolderLock

HOLDER = """
import sys
from pathlib import Path
from shards.files import FolderLock
FolderLock(Path(sys.argv[1]), "in use").acquire()
print(flush=True)
input()
"""


def test_a_lock_is_of_one_process_until_that_ends(tmp_path: Path):
    path = tmp_path / "run" / ".lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(UsageError, match="the folder is in use"), FolderLock(path, "the folder is in use") as lock:
            lock.acquire()
        assert path.exists()  # it is the other's
        holder.kill()
    with FolderLock(path, "the folder is in use") as lock:
        lock.acquire()
        assert path.exists()
    assert not list((tmp_path / "run").iterdir())


def test_the_lock_of_another_process_is_not_deleted_when_this_one_has_lost_its_file(tmp_path: Path):
    with FolderLock(tmp_path / ".lock", "") as lock:
        lock.acquire()
        (tmp_path / ".lock").unlink()
        (tmp_path / ".lock").write_text("another's")
    assert (tmp_path / ".lock").exists()


def test_a_file_that_its_holder_deletes_meanwhile_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / ".lock"
    lockf: Callable[[int, int], None] = fcntl.lockf
    calls: list[int] = []

    def deleted_first(descriptor: int, kind: int) -> None:
        if not calls:
            path.unlink()
        calls.append(descriptor)
        lockf(descriptor, kind)

    monkeypatch.setattr(fcntl, "lockf", deleted_first)
    with FolderLock(path, "") as lock:
        lock.acquire()
        assert len(calls) == 2
        assert path.exists()


@pytest.mark.parametrize(("number", "fails"), [(errno.ENOLCK, False), (errno.EIO, True)])
def test_a_file_system_without_locks_is_taken_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, fails: bool
):
    def fail(descriptor: int, kind: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", fail)
    with FolderLock(tmp_path / ".lock", "") as lock:
        if fails:
            with pytest.raises(OSError, match="Input/output error"):
                lock.acquire()
        else:
            lock.acquire()
