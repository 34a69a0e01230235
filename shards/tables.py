"""CSV tables: read a column by image id, split FILE.csv:COLUMN, write rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from shards.errors import UsageError

ID_COLUMNS = ("isic_id", "image_id", "image", "id")
"""Names of the column with the image's id, the first of them that a table has; else its first column."""


def read_column_of(spec: str, flag: str, example: str) -> tuple[str, dict[str, str]]:
    """The name and the values by image id of the column FILE.csv:COLUMN that `flag` was given.

    `example` is a column name for the message. Raises UsageError that names `flag`.
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
    """A column of a CSV file by image id. Raises UsageError that names `flag`."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            names = list(rows.fieldnames or [])
            if column not in names:
                raise UsageError(f"{flag} {path}: no column {column!r}; it has {', '.join(names) or 'none'}")
            id_column = next((name for name in ID_COLUMNS if name in names), names[0])
            values: dict[str, str] = {}
            for row in rows:
                key, value = (row[id_column] or "").strip(), (row[column] or "").strip()
                if values.setdefault(key, value) != value:
                    raise UsageError(f"{flag} {path}: {key} has two values, {values[key]!r} and {value!r}")
            return values
    except FileNotFoundError as error:
        raise UsageError(f"{flag} {path}: there is no such file") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{flag} {path}: not a CSV file in UTF-8 ({error})") from error


def csv_bytes(columns: Iterable[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """A CSV file with a header; a file name that is no UTF-8 is written with backslash escapes."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(list(columns))
    writer.writerows(rows)
    return text.getvalue().encode(errors="backslashreplace")
