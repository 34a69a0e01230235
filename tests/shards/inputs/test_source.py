"""Sources: a folder, a .zip archive and a URL list and read the same; broken ones are named."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from shards import urls
from shards.build import build
from shards.errors import SourceError, ToolkitError
from shards.inputs.source import open_sources
from shards.planning.plan import BuildOptions
from tests.shards.conftest import write_pair


class FailingFileSystem(MemoryFileSystem):
    """Fails `failures` times, as a server does that is lost, for paths that contain `word`."""

    protocol = "failing"
    word: ClassVar = ""
    failures: ClassVar = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.rpartition("://")[2].rpartition("@")[2].strip("/")

    @classmethod
    def _fail(cls, path: str) -> None:
        if cls.failures and cls.word in path:
            cls.failures -= 1
            raise ConnectionError(f"lost failing://bob:secret@host{path}")

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        self._fail(path)
        return super().ls(path, detail, **options)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> Any:
        self._fail(path)
        return super().cat_file(path, start, end, **options)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> type[FailingFileSystem]:
    monkeypatch.setattr(urls, "BACKOFF_SECONDS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(FailingFileSystem, "failures", 0)
    monkeypatch.setattr(FailingFileSystem, "store", {})
    monkeypatch.setattr(FailingFileSystem, "pseudo_dirs", [""])
    fsspec.register_implementation("failing", FailingFileSystem, clobber=True)
    return FailingFileSystem


def test_folder_archive_and_url_list_and_read_the_same(tmp_path: Path):
    folder = tmp_path / "set"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "A.jpg").write_bytes(b"image")
    (folder / "A_segmentation.png").write_bytes(b"mask")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in folder.rglob("*"):
            archive.write(path, path.relative_to(folder))
    for place in (folder, tmp_path / "set.zip", f"file://{folder}", f"file://{tmp_path}/set.zip"):
        (source,), files = open_sources([str(place)])
        assert [(file.name, file.size) for file in files] == [("A_segmentation.png", 4), ("sub/A.jpg", 5)]
        assert source.read("sub/A.jpg") == b"image"
        source.close()


def test_a_folder_inside_the_other_is_listed_once(tmp_path: Path):
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "A_segmentation.png").write_bytes(b"mask")
    (tmp_path / "A.jpg").write_bytes(b"image")
    _, files = open_sources([str(tmp_path), str(tmp_path / "masks")])
    assert len(files) == 2


def test_an_archive_may_have_the_slashes_of_windows(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("images\\", b"")
        archive.writestr("images\\A.jpg", b"image")
    (source,), (file,) = open_sources([str(tmp_path / "set.zip")])
    assert file.name == "images/A.jpg"
    assert source.read(file.name) == b"image"
    source.close()


def test_an_archive_inside_a_folder_is_a_source_of_its_own(tmp_path: Path):
    (tmp_path / "A.jpg").write_bytes(b"image")
    with zipfile.ZipFile(tmp_path / "masks.zip", "w") as archive:
        archive.writestr("A_segmentation.png", b"mask")
    sources, files = open_sources([str(tmp_path), str(tmp_path / "masks.zip")])
    assert [(file.source, file.name) for file in files] == [(0, "A.jpg"), (0, "masks.zip"), (1, "A_segmentation.png")]
    sources[1].close()


def test_a_folder_of_archives_and_tables_stands_for_the_archives(tmp_path: Path):
    for name in ("part_1", "part_2"):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            archive.writestr(f"{name}.jpg", b"image")
    (tmp_path / "metadata.csv").write_text("image_id\n")
    sources, files = open_sources([str(tmp_path)])
    assert [file.name for file in files] == ["part_1.jpg", "part_2.jpg"]
    for source in sources:
        source.close()


def test_a_folder_behind_a_url_is_never_left_out(failing: type[FailingFileSystem]):
    for name in ("a/1.jpg", "b/2.jpg", "b/c/3.jpg"):
        failing().pipe_file(f"/set/{name}", b"image")
    failing.word, failing.failures = "/set/b", 2  # which pass
    _, files = open_sources(["failing://set"])
    assert [file.name for file in files] == ["a/1.jpg", "b/2.jpg", "b/c/3.jpg"]
    failing.failures = 4
    with pytest.raises(ToolkitError, match=r"^failing://set: cannot be listed \(lost failing://host/set/b\)"):
        open_sources(["failing://bob:secret@set"])


def test_a_lost_server_is_no_bad_input(failing: type[FailingFileSystem], tmp_path: Path):
    for seed in range(6):
        write_pair(tmp_path, f"ISIC_{seed}", seed)
    for path in tmp_path.iterdir():
        failing().pipe_file(f"/set/{path.name}", path.read_bytes())
    options = BuildOptions(size=32, on_bad_input="skip", split="train=1", samples_per_shard=2)
    failing.word, failing.failures = "ISIC_5.jpg", 4
    with pytest.raises(ToolkitError, match=r"ISIC_5\.jpg: cannot be read \(lost .*run the same command again"):
        build("failing://set", "failing://set", tmp_path / "out", options, workers=1)
    failing.failures = 0
    counts = build("failing://set", "failing://set", tmp_path / "out", options, workers=1).index.counts
    assert (counts.packed, counts.rejected) == (12, 0)


def test_a_link_that_leads_back_ends_the_walk(tmp_path: Path):
    (tmp_path / "A.jpg").write_bytes(b"image")
    (tmp_path / "again").symlink_to(tmp_path)
    _, files = open_sources([str(tmp_path)])
    assert [file.name for file in files] == ["A.jpg"]


def test_a_missing_an_empty_and_a_torn_place_are_named(tmp_path: Path):
    (tmp_path / "torn.zip").write_bytes(b"PK\3\4 and no more")
    (tmp_path / "empty").mkdir()
    for name, words in [("none", "no such folder"), ("empty", "no file in it"), ("torn.zip", "not a whole zip")]:
        with pytest.raises(SourceError, match=f"{name}: .*{words}"):
            open_sources([str(tmp_path / name)])
