"""Atomic writes, flushed before they have their name and their name after; locks of folders, of one process at once."""

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
from shards.files import FolderLock, atomic_folder, remove_temporary_files, write_file

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


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is flushed and renamed, by its name at that time."""
    found: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def note_fsync(descriptor: int) -> None:
        found.append(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        fsync(descriptor)

    def note_rename(source: Path, target: Path) -> None:
        found.append(("rename", f"{source.name} {target.name}"))
        rename(source, target)

    def note_replace(source: Path, target: Path) -> None:
        found.append(("rename", f"{source.name} {target.name}"))
        replace(source, target)

    for name, note in (("fsync", note_fsync), ("rename", note_rename), ("replace", note_replace)):
        monkeypatch.setattr(os, name, note)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_file_is_flushed_before_it_is_renamed_and_its_folder_after(tmp_path, calls):
    write_file(tmp_path / "summary.json", b"{}")
    temporary = f".summary.json.{os.getpid()}.new"
    assert calls == [("fsync", temporary), ("rename", f"{temporary} summary.json"), ("fsync", tmp_path.name)]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_folder_is_flushed_with_all_that_is_in_it(tmp_path, calls):
    for _ in range(2):
        calls.clear()
        with atomic_folder(tmp_path / "best") as folder:
            (folder / "below").mkdir()
            (folder / "below" / "image.png").write_bytes(b"1")
            (folder / "model.json").write_bytes(b"{}")
        flushed = {name for call, name in calls[:4] if call == "fsync"}
        assert flushed == {"below", "image.png", "model.json", ".best.new"}
        assert calls[-2:] == [("rename", ".best.new best"), ("fsync", tmp_path.name)]
    assert calls[4] == ("rename", "best .best.old")
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_what_a_killed_process_left_in_a_folder_is_not_published(tmp_path):
    (tmp_path / ".best.new").mkdir()
    (tmp_path / ".best.new" / "half").write_bytes(b"half")
    with atomic_folder(tmp_path / "best") as folder:
        (folder / "whole").write_bytes(b"whole")
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["whole"]


def test_temporary_files_of_dead_processes_alone_are_removed(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait()
    names = [f".mask.png.{dead.pid}.new", f".mask.png.{os.getpid()}.new", ".mask.new", "mask.png"]
    for name in names:
        (tmp_path / name).touch()
    remove_temporary_files(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])
