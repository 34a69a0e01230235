"""Open input folders, zip archives and fsspec URLs, list their files and read them.

`shards.inputs.match` decides which files are images and masks.
"""

from __future__ import annotations

import lzma
import os
import stat
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

from shards.errors import SourceError
from shards.urls import filesystem_of, reach, retry, without_password

IMAGE_TYPES = frozenset({".jpg", ".jpeg", ".png", ".bmp"})
OTHER_IMAGE_TYPES = frozenset({".tif", ".tiff", ".gif", ".webp", ".heic", ".jp2", ".dcm", ".jfif", ".avif", ".jpe"})
PICTURE_TYPES = IMAGE_TYPES | OTHER_IMAGE_TYPES
MAX_FILE_BYTES = 1 << 28  # of one image or mask, unpacked
MISSING = -1
AGAIN = "run the same command again later"
DAMAGED_ARCHIVE_ERRORS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError)
"""Raised by zipfile for what an archive holds: damaged, or encrypted."""


@dataclass(frozen=True, slots=True)
class File:
    """One file of a source."""

    source: int
    """Index of its source in the list of sources."""
    name: str
    """Path inside the source, with forward slashes."""
    size: int
    """Size in bytes; MISSING for a link to a file that does not exist."""
    crc: int = 0
    """CRC-32, in an archive; else 0."""
    changed: int = 0
    """Time of the last change in nanoseconds, in a folder; else 0."""


class Source(Protocol):
    """A folder, an archive or a URL with input files."""

    @property
    def location(self) -> str:
        """Path or URL of the source; a URL with its password."""
        ...

    def files(self, source: int) -> list[File]:
        """List all files, sorted by name; `source` is the value of their `source` field."""
        ...

    def read(self, name: str) -> bytes:
        """Read a whole file. Raises OSError, what a damaged archive raises, or ToolkitError when a URL fails."""
        ...

    def close(self) -> None:
        """Close the files that this process has opened."""
        ...


@dataclass(frozen=True)
class FolderSource:
    """A folder with everything below it. To read a file again costs no more than to read a copy of it."""

    location: str

    def files(self, source: int) -> list[File]:
        """List the regular files below the folder, links followed, sorted by name."""
        found: list[File] = []
        seen: set[str] = set()
        for folder, below, names in os.walk(self.location, followlinks=True, onerror=_raise):
            real = os.path.realpath(folder)
            if real in seen:  # a link that leads back
                below.clear()
                continue
            seen.add(real)
            inside = Path(folder).relative_to(self.location).as_posix()
            prefix = "" if inside == "." else f"{inside}/"
            for name in names:
                path = f"{folder}/{name}"
                try:
                    status = os.stat(path)  # noqa: PTH116  pathlib takes a minute for a million pairs
                except OSError:
                    if not Path(path).is_symlink():
                        raise
                    found.append(File(source, prefix + name, MISSING))
                    continue
                if stat.S_ISREG(status.st_mode):
                    found.append(File(source, prefix + name, status.st_size, changed=status.st_mtime_ns))
        return sorted(found, key=lambda file: file.name)

    def read(self, name: str) -> bytes:
        """Read a whole file. Raises OSError."""
        # Without pathlib and a buffer, which cost a tenth of the time that it takes to copy a pair.
        with open(f"{self.location}/{name}", "rb", buffering=0) as file:  # noqa: PTH123
            return file.read()

    def close(self) -> None:
        """Do nothing: no file stays open."""


class ZipSource:
    """A zip archive, read without extraction; each process opens it once and keeps it open until `close`."""

    def __init__(self, location: str) -> None:
        self.location = location
        """Path or fsspec URL of the archive."""
        self._archives: dict[int, zipfile.ZipFile] = {}  # by process id: a fork must not share the file position

    def files(self, source: int) -> list[File]:
        """List the files of the archive, sorted by name. Raises SourceError when it is not a whole zip archive."""
        entries = [entry for entry in self._archive().infolist() if not entry.filename.endswith(("/", "\\"))]
        found = [File(source, entry.filename.replace("\\", "/"), entry.file_size, crc=entry.CRC) for entry in entries]
        return sorted(found, key=lambda file: file.name)

    def read(self, name: str) -> bytes:
        """Decompress a whole file, checked against its CRC-32; no more of it than the archive's list says."""
        archive, remote = self._archive(), "://" in self.location
        entry = archive.getinfo(name)
        with (
            reach(self.location, "read", AGAIN, passing=DAMAGED_ARCHIVE_ERRORS) if remote else nullcontext(),
            archive.open(entry) as file,
        ):
            return file.read(entry.file_size)

    def close(self) -> None:
        """Close the archive of this process."""
        archive = self._archives.pop(os.getpid(), None)
        if archive is not None:
            file = archive.fp
            archive.close()
            if file is not None:
                file.close()  # it was opened here, so the archive leaves it open

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the location only: another machine opens the archive anew."""
        return ZipSource, (self.location,)

    def _archive(self) -> zipfile.ZipFile:
        process = os.getpid()
        if process not in self._archives:
            with reach(self.location, "read") if "://" in self.location else nullcontext():
                file = self._open()
                try:
                    archive = zipfile.ZipFile(file)
                except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
                    file.close()
                    location = without_password(self.location)
                    raise SourceError(f"{location}: not a whole zip archive ({error}); download it again") from error
            # Some programs for Windows write backslashes.
            archive.NameToInfo |= {entry.filename.replace("\\", "/"): entry for entry in archive.infolist()}
            self._archives[process] = archive
        return self._archives[process]

    def _open(self) -> BinaryIO:
        if "://" not in self.location:
            return Path(self.location).open("rb")
        filesystem, path = filesystem_of(self.location)
        return filesystem.open(path, "rb")


@dataclass(frozen=True)
class UrlSource:
    """A folder behind an fsspec URL."""

    location: str

    def files(self, source: int) -> list[File]:
        """List all files below the URL, sorted by name. Raises ToolkitError."""
        with reach(self.location, "listed"):
            filesystem, root = filesystem_of(self.location)
            files: list[File] = []
            # Not by the file system's `find`, which leaves out a folder that it fails to list.
            folders, seen = [root], {root}
            while folders:
                folder = folders.pop()
                for entry in retry(partial(filesystem.ls, folder, detail=True)):
                    path = entry["name"].rstrip("/")
                    if entry["type"] == "directory":
                        folders += [path] if path not in seen else []
                        seen.add(path)
                    elif path != folder:  # an object store may keep an empty object for the folder
                        files.append(File(source, path.removeprefix(f"{root}/"), int(entry["size"] or 0)))
        return sorted(files, key=lambda file: file.name)

    def read(self, name: str) -> bytes:
        """Download a whole file. Raises FileNotFoundError or ToolkitError."""
        return _download(self.location, name)

    def close(self) -> None:
        """Do nothing: no file stays open."""


@dataclass(frozen=True)
class FileSource:
    """A single image at a path or an fsspec URL."""

    location: str

    def files(self, source: int) -> list[File]:
        """List the one file. Raises OSError or ToolkitError."""
        path = PurePosixPath(self.location)
        if "://" not in self.location:
            status = Path(path).stat()
            return [File(source, path.name, status.st_size, changed=status.st_mtime_ns)]
        with reach(self.location, "read"):
            filesystem, remote_path = filesystem_of(self.location)
            size = retry(partial(filesystem.info, remote_path))["size"]
            return [File(source, PurePosixPath(remote_path).name, int(size or 0))]

    def read(self, name: str) -> bytes:
        """Read the one file, whatever the name. Raises OSError or ToolkitError."""
        return _download(self.location) if "://" in self.location else Path(self.location).read_bytes()

    def close(self) -> None:
        """Do nothing: no file stays open."""


def open_source(location: str) -> Source:
    """Open the source at a path or URL. Raises SourceError when there is none."""
    is_file = "://" in location or Path(location).is_file()
    if is_file and location.lower().endswith(".zip"):
        return ZipSource(location)
    if is_file and PurePosixPath(location).suffix.lower() in IMAGE_TYPES:
        return FileSource(location)
    if "://" in location:
        return UrlSource(location)
    if Path(location).is_dir():
        return FolderSource(location)
    if Path(location).exists():
        raise SourceError(
            f"{location}: not a folder, a .zip archive, nor a .jpg, .png or .bmp picture; give one of these"
        )
    raise SourceError(f"{location}: there is no such folder or archive; check the path")


def open_sources(locations: Iterable[str]) -> tuple[list[Source], list[File]]:
    """Open the sources (each once, however often it is named) and list their files.

    A folder or a picture inside another of the sources is listed with the outer one only. A folder that holds .zip
    archives but neither pictures nor folders stands for these archives.
    Raises SourceError that names a location which is missing or has no file, ToolkitError when a URL fails.
    """
    sources: list[Source] = []
    files: list[File] = []
    expanded = dict.fromkeys(archive for location in locations for archive in archives_in(location))
    for location in _outermost(list(expanded)):
        source, where = open_source(location), without_password(location)
        try:
            found = source.files(len(sources))
        except OSError as error:
            raise SourceError(f"{where}: cannot be listed ({error}); check the path and your rights") from error
        if not found:
            raise SourceError(f"{where}: there is no file in it; give the folder or archive with the pictures")
        sources.append(source)
        files += found
    return sources, files


def files_outside(folder: str, sources: Sequence[Source], files: list[File]) -> list[File]:
    """Leave out the files below a local folder inside of a source, such as those of the set that is built there."""
    real = Path(os.path.realpath(folder))
    prefixes: dict[int, str] = {}
    for number, source in enumerate(sources):
        root = Path(os.path.realpath(source.location)) if isinstance(source, FolderSource) else real
        if root in real.parents:
            prefixes[number] = f"{real.relative_to(root).as_posix()}/"
    return [file for file in files if not (file.source in prefixes and file.name.startswith(prefixes[file.source]))]


def archives_in(location: str) -> list[str]:
    """List the .zip archives of a local folder without pictures or folders, sorted; for any other location itself."""
    if "://" in location or not Path(location).is_dir():
        return [location]
    entries = sorted(entry for entry in Path(location).iterdir() if not entry.name.startswith("."))
    if any(entry.is_dir() or entry.suffix.lower() in PICTURE_TYPES for entry in entries):
        return [location]
    return [str(entry) for entry in entries if entry.suffix.lower() == ".zip"] or [location]


def _outermost(locations: list[str]) -> list[str]:
    """Drop the locations that are the same as another one, and what is listed with a folder: not archives in it."""
    outermost: dict[Path, str] = {}
    folders = {Path(os.path.realpath(location)) for location in locations if Path(location).is_dir()}
    for location in locations:
        path = Path(location if "://" in location else os.path.realpath(location))
        is_listed = path.suffix.lower() != ".zip" or path in folders
        if path not in outermost and not (is_listed and folders.intersection(path.parents)):
            outermost[path] = location
    return list(outermost.values())


def _download(url: str, name: str = "") -> bytes:
    """Read a whole file below a URL, or at it. Raises FileNotFoundError, or ToolkitError for any other failure."""
    with reach(f"{url.rstrip('/')}/{name}".rstrip("/"), "read", AGAIN, passing=(FileNotFoundError,)):
        filesystem, root = filesystem_of(url)
        return retry(partial(filesystem.cat_file, f"{root}/{name}".rstrip("/")))


def _raise(error: OSError) -> None:
    raise error
