"""Find images and masks in folders, zip archives and fsspec URLs, and pair them by name.

Nothing is decoded here (see `shards.pair`). Every file that is found ends in one of three lists: part of a pair,
rejected with a reason, or ignored because it is known to be neither image nor mask.
"""

from __future__ import annotations

import os
import stat
import zipfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

from shards import format
from shards.errors import SourceError

MASK_SUFFIX = "_segmentation"
IMAGE_TYPES = frozenset({".jpg", ".jpeg", ".png", ".bmp"})
OTHER_IMAGE_TYPES = frozenset({".tif", ".tiff", ".gif", ".webp", ".heic", ".jp2", ".dcm", ".jfif"})
MAX_FILE_BYTES = 1 << 29  # of one image or mask, unpacked

REASONS = {
    "no-mask": "an image without a mask",
    "no-image": "a mask without an image",
    "illegal-key": "a name that cannot be a WebDataset key",
    "duplicate-key": "more than one image or mask for a key (upper and lower case count as one)",
    "unsupported": "an image in a format other than JPEG, PNG and BMP",
    "unreadable": "bytes that do not decode",
    "truncated": "a file that ends too early",
    "pixel-limit": "more pixels or bytes than an honest photograph has",
    "size-mismatch": "an image and a mask of different sizes",
    "orientation": "an EXIF rotation that may or may not hold for the mask",
    "mask-values": "a mask with marks, none of them above 128",
    "partner": "a file whose image or mask was rejected",
}


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


@dataclass(frozen=True, slots=True)
class Rejected:
    """A file that is left out."""

    path: str
    """Its path inside its source."""
    reason: str
    """One of `REASONS`."""
    detail: str


@dataclass(frozen=True, slots=True)
class Pair:
    """An image and its mask."""

    key: str
    image: File
    mask: File


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """What was found, each file in exactly one of the three lists."""

    pairs: list[Pair]
    """Sorted by key."""
    rejected: list[Rejected]
    ignored: list[File]

    @property
    def found(self) -> int:
        """The number of files."""
        return 2 * len(self.pairs) + len(self.rejected) + len(self.ignored)


class BadInputError(SourceError):
    """Some of the inputs cannot be used, and the build was told to stop at that."""

    def __init__(self, rejected: list[Rejected]) -> None:
        first = rejected[0]
        super().__init__(
            f"{len(rejected)} of the input files cannot be used (first: {first.path}: {first.reason}, {first.detail}); "
            "mend them or leave them out with --on-bad-input skip"
        )
        self.rejected = rejected


class Source(Protocol):
    """A place with files."""

    @property
    def place(self) -> str:
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
    """A folder with everything below it."""

    place: str

    def files(self, source: int) -> list[File]:
        found, seen = [], set()
        for folder, below, names in os.walk(self.place, followlinks=True, onerror=_raise):
            real = os.path.realpath(folder)
            if real in seen:  # a link that leads back
                below.clear()
                continue
            seen.add(real)
            for name in names:
                path = Path(folder, name)
                status = path.stat()
                if stat.S_ISREG(status.st_mode):
                    inside = path.relative_to(self.place).as_posix()
                    found.append(File(source, inside, status.st_size, changed=status.st_mtime_ns))
        return sorted(found, key=lambda file: file.name)

    def read(self, name: str) -> bytes:
        return Path(self.place, name).read_bytes()

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class ZipSource:
    """A zip archive, read in place; `place` is a path or an fsspec URL."""

    place: str
    _open: dict[int, zipfile.ZipFile] = field(default_factory=dict, repr=False, compare=False)

    def files(self, source: int) -> list[File]:
        entries = [entry for entry in self._archive().infolist() if not entry.is_dir()]
        found = [File(source, entry.filename, entry.file_size, crc=entry.CRC) for entry in entries]
        return sorted(found, key=lambda file: file.name)

    def read(self, name: str) -> bytes:
        return self._archive().read(name)

    def _archive(self) -> zipfile.ZipFile:
        # A forked process must not share its parent's file position.
        process = os.getpid()
        if process not in self._open:
            file = self._file()
            try:
                self._open[process] = zipfile.ZipFile(file)
            except zipfile.BadZipFile as error:
                file.close()
                raise SourceError(f"{self.place}: not a whole zip archive ({error}); download it again") from error
        return self._open[process]

    def close(self) -> None:
        archive = self._open.pop(os.getpid(), None)
        if archive is not None:
            file = archive.fp
            archive.close()
            if file is not None:
                file.close()  # it was opened here, so the archive leaves it open

    def _file(self) -> BinaryIO:
        if "://" not in self.place:
            return Path(self.place).open("rb")
        filesystem, path = _filesystem(self.place)
        return filesystem.open(path, "rb")


@dataclass(frozen=True)
class UrlSource:
    """A folder behind an fsspec URL."""

    place: str

    def files(self, source: int) -> list[File]:
        filesystem, root = _filesystem(self.place)
        found = filesystem.find(root, detail=True)
        files = [
            File(source, str(PurePosixPath(path).relative_to(root)), int(info["size"] or 0))
            for path, info in found.items()
        ]
        return sorted(files, key=lambda file: file.name)

    def read(self, name: str) -> bytes:
        filesystem, root = _filesystem(self.place)
        return filesystem.cat_file(f"{root}/{name}")

    def close(self) -> None:
        pass


def open_source(place: str) -> Source:
    """The source at a path or URL. Raises SourceError when there is none."""
    if place.lower().endswith(".zip") and ("://" in place or Path(place).is_file()):
        return ZipSource(place)
    if "://" in place:
        return UrlSource(place)
    if Path(place).is_dir():
        return FolderSource(place)
    if Path(place).exists():
        raise SourceError(f"{place}: neither a folder nor a .zip archive; give one of the two or a URL")
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


def pair_files(files: Iterable[File], mask_suffix: str = MASK_SUFFIX) -> Pairing:
    """Pair images with masks by name: KEY.jpg with KEY<mask_suffix>.png, in any folders.

    Upper and lower case are one, so that no two keys differ by case only. Raises SourceError without any pair.
    """
    images: dict[str, list[tuple[str, File]]] = defaultdict(list)
    masks: dict[str, list[tuple[str, File]]] = defaultdict(list)
    pairs: list[Pair] = []
    rejected: list[Rejected] = []
    ignored: list[File] = []
    for file in files:
        path = PurePosixPath(file.name)
        if _is_ignored(path):
            ignored.append(file)
        elif path.suffix.lower() in OTHER_IMAGE_TYPES:
            detail = f"{path.suffix} is not read; convert it to PNG or JPEG"
            rejected.append(Rejected(file.name, "unsupported", detail))
        elif path.stem.lower().endswith(mask_suffix.lower()):
            key = path.stem[: -len(mask_suffix)]
            masks[key.lower()].append((key, file))
        else:
            images[path.stem.lower()].append((path.stem, file))
    for folded in sorted(images.keys() | masks.keys()):
        _pair_one(images.get(folded, []), masks.get(folded, []), mask_suffix, pairs, rejected)
    if not pairs:
        raise SourceError(
            f"no image has a mask: {len(images)} images, {len(masks)} masks named KEY{mask_suffix}.png; "
            "check --images, --masks and --mask-suffix"
        )
    pairs.sort(key=lambda pair: pair.key)
    return Pairing(pairs=pairs, rejected=rejected, ignored=ignored)


def images_only(files: Iterable[File], mask_suffix: str = MASK_SUFFIX) -> list[File]:
    """The files that are images by their name: neither masks nor what lies beside them in the archives."""
    found = []
    for file in files:
        path = PurePosixPath(file.name)
        is_mask = path.stem.lower().endswith(mask_suffix.lower())
        if path.suffix.lower() in IMAGE_TYPES and not is_mask and not _is_ignored(path):
            found.append(file)
    return found


def _pair_one(
    images: list[tuple[str, File]],
    masks: list[tuple[str, File]],
    mask_suffix: str,
    pairs: list[Pair],
    rejected: list[Rejected],
) -> None:
    """Make a pair of what there is for one key, or reject all of it."""
    all_files = [file for _, file in images + masks]
    key = (images or masks)[0][0]
    if not format.KEY_PATTERN.match(key):
        detail = f"key {key!r}: use 1 to 80 letters, digits, _ and - and no dot"
        rejected += [Rejected(file.name, "illegal-key", detail) for file in all_files]
    elif len(images) > 1 or len(masks) > 1:
        # Which image belongs to which mask is a guess, so none of them is taken.
        detail = f"key {key}: " + ", ".join(file.name for file in all_files)
        rejected += [Rejected(file.name, "duplicate-key", detail) for file in all_files]
    elif not masks:
        rejected.append(Rejected(all_files[0].name, "no-mask", f"there is no {key}{mask_suffix}.png"))
    elif not images:
        rejected.append(Rejected(all_files[0].name, "no-image", f"there is no {key}.jpg"))
    else:
        pairs.append(Pair(key, images[0][1], masks[0][1]))


def _is_ignored(path: PurePosixPath) -> bool:
    if any(part.startswith(".") or part == "__MACOSX" for part in path.parts):
        return True
    if path.stem.lower().endswith("_superpixels"):
        return True
    return path.suffix.lower() not in IMAGE_TYPES | OTHER_IMAGE_TYPES


def _outermost(places: list[str]) -> list[str]:
    """The places without those that are another one or lie inside it."""
    kept: dict[Path, str] = {}
    folders = {Path(place).resolve() for place in places if Path(place).is_dir()}
    for place in places:
        path = Path(place).resolve() if "://" not in place else Path(place)
        if path not in kept and not folders.intersection(path.parents):
            kept[path] = place
    return list(kept.values())


def _filesystem(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    filesystem, path = url_to_fs(url)
    return filesystem, path.rstrip("/")


def _raise(error: OSError) -> None:
    raise error
