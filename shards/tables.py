"""CSV tables: read a column by image id, split FILE.csv:COLUMN, write rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from shards.errors import UsageError

DOWNSAMPLED = "_downsampled"
"""Suffix of the names of images that ISIC 2019 has reduced; their masks are named without it."""
ID_COLUMNS = ("isic_id", "image_id", "image", "id")
"""Names of the column with the image's id: the first of them in a table, else its first column."""


def read_column_of(spec: str, flag: str, example: str) -> tuple[str, dict[str, str]]:
    """Read the column FILE.csv:COLUMN given to `flag`: its name, and its values by image id.

    `example` is a column name for the message. Raises UsageError with the flag, as `read_column`.
    """
    path, column = parse_column_spec(spec, flag, example)
    return column, read_column(path, column, flag)


def parse_column_spec(spec: str, flag: str, example: str) -> tuple[Path, str]:
    """Split FILE.csv:COLUMN into path and column; `example` is a column name for the UsageError, which names `flag`."""
    path, _, column = spec.rpartition(":")
    if not path:
        raise UsageError(f"{flag} {spec}: write FILE.csv:COLUMN, as in metadata.csv:{example}")
    return Path(path), column


def read_column(path: Path, column: str, flag: str) -> dict[str, str]:
    """Read a column of a CSV file: its values by image id, under each of `_names_of`. Rows without an id are left out.

    Raises UsageError with the flag for a missing file or column, for a file that is not CSV in UTF-8, and for an id
    with two values.
    """
    names, rows = _read(path, flag)
    if column not in names:
        raise UsageError(f"{flag} {path}: no column {column!r}; it has {', '.join(names) or 'none'}")
    id_column = _id_column(names)
    values: dict[str, str] = {}
    for row in rows:
        key, value = (row[id_column] or "").strip(), (row[column] or "").strip()
        if key and values.setdefault(key, value) != value:
            raise UsageError(f"{flag} {path}: {key} has two values, {values[key]!r} and {value!r}")
    for key, value in list(values.items()):
        for name in _names_of(key):
            values.setdefault(name, value)
    return values


def read_ids(path: Path, flag: str) -> tuple[set[str], list[str]]:
    """Read the image ids of a CSV file, under each of `_names_of`, and the names of its columns.

    Raises UsageError with the flag for a missing file, one without a column, and one that is not CSV in UTF-8.
    """
    names, rows = _read(path, flag)
    if not names:
        raise UsageError(f"{flag} {path}: it is empty; it needs a line of column names, as id")
    ids = {(row[_id_column(names)] or "").strip() for row in rows} - {""}
    return {name for key in ids for name in _names_of(key)}, names


def _read(path: Path, flag: str) -> tuple[list[str], list[dict[str, str | None]]]:
    """Read the names of the columns and the rows of a CSV file."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            return list(rows.fieldnames or []), list(rows)
    except FileNotFoundError as error:
        raise UsageError(f"{flag} {path}: there is no such file") from error
    except IsADirectoryError as error:
        raise UsageError(f"{flag} {path}: it is a folder; give a CSV file") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{flag} {path}: not a CSV file in UTF-8 ({error})") from error


def _names_of(key: str) -> tuple[str, ...]:
    """Give the ids that an image may have where a table names it so: KEY.jpg and KEY_downsampled are KEY, too."""
    stem = key.partition(".")[0]  # no id has a dot
    return key, stem, stem.removesuffix(DOWNSAMPLED)


def _id_column(names: Sequence[str]) -> str:
    return next((name for name in ID_COLUMNS if name in names), names[0])


def csv_bytes(columns: Iterable[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """Format a CSV file with a header line; undecodable bytes of a file name become backslash escapes."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(list(columns))
    writer.writerows(rows)
    return text.getvalue().encode(errors="backslashreplace")
