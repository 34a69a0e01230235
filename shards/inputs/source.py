"""Find files in folders, zip archives and fsspec URLs, and read them. `shards.inputs.match` says what they are for."""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

from shards.errors import SourceError
from shards.inputs.headers import HEAD, TAIL

IMAGE_TYPES = frozenset({".jpg", ".jpeg", ".png", ".bmp"})
MAX_FILE_BYTES = 1 << 29  # of one image or mask, unpacked


@dataclass(frozen=True, slots=True)
class File:
    """One file of a source."""

    source: int
    """Its source's place in the list of sources."""
    name: str
    """Path inside the source, with forward slashes."""
    size: int
    """Bytes."""
    crc: int = 0
    """CRC-32, in an archive; else 0."""
    changed: int = 0
    """Time of the last change in nanoseconds, in a folder; else 0."""


class Source(Protocol):
    """A place with files."""

    @property
    def location(self) -> str:
        """Its path or URL."""
        ...

    def files(self, source: int) -> list[File]:
        """All of its files, sorted by name; `source` is what their `source` field says."""
        ...

    def read(self, name: str) -> bytes:
        """The bytes of a file. Raises OSError, or what a damaged archive raises."""
        ...

    def close(self) -> None:
        """Close what this process has opened."""
        ...


@dataclass(frozen=True)
class FolderSource:
    """A folder with everything below it. To read a file again costs no more than to read a copy of it."""

    location: str

    def files(self, source: int) -> list[File]:
        found, seen = [], set()
        for folder, below, names in os.walk(self.location, followlinks=True, onerror=_raise):
            real = os.path.realpath(folder)
            if real in seen:  # a link that leads back
                below.clear()
                continue
            seen.add(real)
            inside = Path(folder).relative_to(self.location).as_posix()
            prefix = "" if inside == "." else f"{inside}/"
            for name in names:
                status = os.stat(f"{folder}/{name}")  # noqa: PTH116  pathlib takes a minute for a million pairs
                if stat.S_ISREG(status.st_mode):
                    found.append(File(source, prefix + name, status.st_size, changed=status.st_mtime_ns))
        return sorted(found, key=lambda file: file.name)

    def read(self, name: str) -> bytes:
        # Without pathlib and a buffer, which cost a tenth of the time that it takes to copy a pair.
        with open(f"{self.location}/{name}", "rb", buffering=0) as file:  # noqa: PTH123
            return file.read()

    def read_ends(self, name: str) -> bytes:
        """As `headers.ends_of` the bytes of a file, but what lies between them is not read. Raises OSError."""
        with open(f"{self.location}/{name}", "rb", buffering=0) as file:  # noqa: PTH123
            size = os.fstat(file.fileno()).st_size
            if size <= HEAD + TAIL:
                return file.read()
            return os.pread(file.fileno(), HEAD, 0) + os.pread(file.fileno(), TAIL, size - TAIL)

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class ZipSource:
    """A zip archive, read in place; `place` is a path or an fsspec URL."""

    location: str
    _open: dict[int, zipfile.ZipFile] = field(default_factory=dict, repr=False, compare=False)

    def files(self, source: int) -> list[File]:
        entries = [entry for entry in self._archive().infolist() if not entry.is_dir()]
        found = [File(source, entry.filename, entry.file_size, crc=entry.CRC) for entry in entries]
        return sorted(found, key=lambda file: file.name)

    def read(self, name: str) -> bytes:
        return self._archive().read(name)

    def __reduce__(self) -> tuple[Any, ...]:
        return ZipSource, (self.location,)  # on another machine it is opened anew

    def _archive(self) -> zipfile.ZipFile:
        # A forked process must not share its parent's file position.
        process = os.getpid()
        if process not in self._open:
            file = self._file()
            try:
                self._open[process] = zipfile.ZipFile(file)
            except zipfile.BadZipFile as error:
                file.close()
                raise SourceError(f"{self.location}: not a whole zip archive ({error}); download it again") from error
        return self._open[process]

    def close(self) -> None:
        archive = self._open.pop(os.getpid(), None)
        if archive is not None:
            file = archive.fp
            archive.close()
            if file is not None:
                file.close()  # it was opened here, so the archive leaves it open

    def _file(self) -> BinaryIO:
        if "://" not in self.location:
            return Path(self.location).open("rb")
        filesystem, path = filesystem_of(self.location)
        return filesystem.open(path, "rb")


@dataclass(frozen=True)
class UrlSource:
    """A folder behind an fsspec URL."""

    location: str

    def files(self, source: int) -> list[File]:
        filesystem, root = filesystem_of(self.location)
        found = filesystem.find(root, detail=True)
        files = [
            File(source, str(PurePosixPath(path).relative_to(root)), int(info["size"] or 0))
            for path, info in found.items()
        ]
        return sorted(files, key=lambda file: file.name)

    def read(self, name: str) -> bytes:
        filesystem, root = filesystem_of(self.location)
        return filesystem.cat_file(f"{root}/{name}")

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class FileSource:
    """A single picture; `place` is a path or an fsspec URL."""

    location: str

    def files(self, source: int) -> list[File]:
        filesystem, path = filesystem_of(self.location)
        size = int(filesystem.info(path)["size"] or 0)
        changed = Path(self.location).stat().st_mtime_ns if "://" not in self.location else 0
        return [File(source, PurePosixPath(path).name, size, changed=changed)]

    def read(self, name: str) -> bytes:
        filesystem, path = filesystem_of(self.location)
        return filesystem.cat_file(path)

    def close(self) -> None:
        pass


def open_source(place: str) -> Source:
    """The source at a path or URL. Raises SourceError when there is none."""
    is_file = "://" in place or Path(place).is_file()
    if is_file and place.lower().endswith(".zip"):
        return ZipSource(place)
    if is_file and PurePosixPath(place).suffix.lower() in IMAGE_TYPES:
        return FileSource(place)
    if "://" in place:
        return UrlSource(place)
    if Path(place).is_dir():
        return FolderSource(place)
    if Path(place).exists():
        raise SourceError(f"{place}: not a folder, a .zip archive, nor a .jpg, .png or .bmp picture; give one of these")
    raise SourceError(f"{place}: there is no such folder or archive; check the path")


def find(places: Iterable[str]) -> tuple[list[Source], list[File]]:
    """Open the places (each once, however often it is named) and list their files.

    A folder inside another of the places is listed with the outer one only.
    Raises SourceError that names a place which is missing or has no file.
    """
    sources: list[Source] = []
    files: list[File] = []
    for place in _outermost(list(dict.fromkeys(places))):
        source = open_source(place)
        try:
            found = source.files(len(sources))
        except (OSError, ImportError, ValueError) as error:
            raise SourceError(f"{place}: cannot be listed ({error}); check the path and your rights") from error
        if not found:
            raise SourceError(f"{place}: there is no file in it; give the folder or archive with the pictures")
        sources.append(source)
        files += found
    return sources, files


def _outermost(places: list[str]) -> list[str]:
    """The places without those that are another one or lie inside it."""
    kept: dict[Path, str] = {}
    folders = {Path(place).resolve() for place in places if Path(place).is_dir()}
    for place in places:
        path = Path(place).resolve() if "://" not in place else Path(place)
        if path not in kept and not folders.intersection(path.parents):
            kept[path] = place
    return list(kept.values())


def filesystem_of(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it. Raises ImportError or ValueError where there is none."""
    from fsspec.core import url_to_fs

    filesystem, path = url_to_fs(url)
    return filesystem, path.rstrip("/")


def _raise(error: OSError) -> None:
    raise error
