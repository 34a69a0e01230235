"""Atomic writes: flushed before they have their name, and their name after; what a kill leaves does no harm."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shards.files import atomic_folder, remove_temporary_files, write_file


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
