"""Sets written to fsspec URLs: to the memory of this process, and by several processes to a store without renames."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from shards.build import build
from shards.errors import ToolkitError, UsageError
from shards.format import Index
from shards.inputs.match import BadInputError
from shards.planning.plan import BuildOptions
from tests.shards.test_cli import run

OPTIONS = BuildOptions(size=32, samples_per_shard=7, split="train=0.6,val=0.2,test=0.2")


class ObjectStore(LocalFileSystem):
    """Files of this machine that can be uploaded, read, listed and deleted, as in an object store, and no more."""

    protocol = "objects"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return LocalFileSystem._strip_protocol(path.removeprefix("objects://"))

    def mv(self, *names: Any, **options: Any) -> None:
        raise NotImplementedError

    rename = mv


@pytest.fixture(scope="module")
def local(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A set built in a folder: what every other place has to hold."""
    out = tmp_path_factory.mktemp("target") / "set"
    build(str(pictures), str(pictures), out, OPTIONS, workers=1)
    return content(f"file://{out}")


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    filesystem = MemoryFileSystem()
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


def content(url: str) -> dict[str, bytes]:
    filesystem, root = fsspec.url_to_fs(url)
    return {path[len(root) + 1 :]: filesystem.cat_file(path) for path in filesystem.find(root)}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_store_without_renames_gets_the_same_bytes(
    pictures: Path, local: dict[str, bytes], tmp_path: Path, workers: int
):
    fsspec.register_implementation("objects", ObjectStore, clobber=True)
    url = f"objects://{tmp_path}/deep/set"
    build(str(pictures), str(pictures), url, OPTIONS, workers=workers)
    assert content(url) == local


def test_a_file_url_is_a_folder(pictures: Path, local: dict[str, bytes], tmp_path: Path):
    build(str(pictures), str(pictures), f"file://{tmp_path}/set", OPTIONS, workers=2)
    assert content(f"file://{tmp_path}/set") == local


def test_a_complete_set_is_left_alone_and_another_build_refused(
    pictures: Path, local: dict[str, bytes], memory: MemoryFileSystem
):
    assert not build(str(pictures), str(pictures), "memory://set/", OPTIONS, workers=1).already_complete
    assert content("memory://set") == local
    assert build(str(pictures), str(pictures), "memory://set", OPTIONS, workers=1).already_complete
    with pytest.raises(UsageError, match=r"memory://set: holds another build; .*seed \(0 there, 1 here\)"):
        build(str(pictures), str(pictures), "memory://set", BuildOptions(seed=1, size=32), workers=1)
    memory.pipe_file("/other/thesis.txt", b"mine")
    with pytest.raises(UsageError, match="holds files that are no shard set"):
        build(str(pictures), str(pictures), "memory://other", OPTIONS, workers=1)
    assert content("memory://other") == {"thesis.txt": b"mine"}


@pytest.mark.parametrize("uploads", [0, 1, 9, 41])
def test_a_build_that_breaks_off_is_completed_and_the_index_comes_last(
    pictures: Path, local: dict[str, bytes], memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch, uploads: int
):
    put, names = MemoryFileSystem.put_file, []

    def breaks(self: MemoryFileSystem, lpath: str, rpath: str, **options: Any) -> None:
        if len(names) == uploads:
            raise OSError("the store is full")
        names.append(rpath)
        put(self, lpath, rpath, **options)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "put_file", breaks)
        with pytest.raises(ToolkitError, match=r"memory://set: cannot be written \(the store is full\)"):
            build(str(pictures), str(pictures), "memory://set", OPTIONS, workers=1)
    assert not memory.exists("/set/index.json")
    before = len(names)
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "put_file", lambda *words, **options: names.append(words[2]) or put(*words))
        build(str(pictures), str(pictures), "memory://set", OPTIONS, workers=1)
    assert content("memory://set") == local
    assert names[-1] == "/set/index.json"
    plan = "/set/.build/plan.json"
    assert not {name for name in names[:before] if name != plan} & set(names[before:])  # nothing is done twice


def test_bad_inputs_leave_nothing(pictures: Path, memory: MemoryFileSystem, tmp_path: Path):
    folder = Path(shutil.copytree(pictures, tmp_path / "in"))
    (folder / "ISIC_0000003.jpg").write_bytes(b"no picture")
    with pytest.raises(BadInputError):
        build(str(folder), str(folder), "memory://set", OPTIONS, workers=1)
    assert memory.find("/set") == []


def test_a_url_that_nothing_can_write_to_is_one_line(pictures: Path, capsys: pytest.CaptureFixture[str]):
    assert run("build", "--images", pictures, "--masks", pictures, "--out", "nothing://bucket/set") == 2
    assert capsys.readouterr().err.startswith("error: --out nothing://bucket/set: cannot be written to (")


def test_the_command_takes_a_url(pictures: Path, memory: MemoryFileSystem, capsys: pytest.CaptureFixture[str]):
    words = ("--images", pictures, "--masks", pictures, "--out", "memory://set", "--size", "32", "--workers", "1")
    assert run("build", *words) == 0
    assert "memory://set: train" in capsys.readouterr().out
    assert Index.parse(memory.cat_file("/set/index.json"), "here").counts.packed == 80
