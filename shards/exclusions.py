"""Tables of images to exclude: what `isic-shards build --exclude` and `isicdist evaluate --exclude` read.

A CSV file with a column of image ids (isic_id, image_id, image or id, else its first one) and, as a rule, a column
`verdict`: only the images with the verdict `wrong` are excluded, so that the table of a review can be given as it is.
Without that column all images of the table are excluded.
"""

from __future__ import annotations

from pathlib import Path

from shards.errors import UsageError
from shards.tables import read_column, read_ids

VERDICT_COLUMN = "verdict"
WRONG, UNSURE, KEEP = "wrong", "unsure", "keep"
VERDICTS = (KEEP, WRONG, UNSURE)
"""Values of the column `verdict`, beside the empty one of an image that nobody has looked at."""


def read_excluded(path: Path) -> frozenset[str]:
    """Read the ids of the images to exclude. Raises UsageError for another table, and for one of none."""
    flag = "--exclude"
    ids, columns = read_ids(path, flag)
    if VERDICT_COLUMN not in columns:
        excluded = frozenset(ids)
    else:
        verdicts = read_column(path, VERDICT_COLUMN, flag)
        for key, verdict in verdicts.items():
            if verdict and verdict not in VERDICTS:
                raise UsageError(f"{flag} {path}: verdict {verdict!r} of {key}; write {', '.join(VERDICTS)} or nothing")
        excluded = frozenset(key for key, verdict in verdicts.items() if verdict == WRONG)
    if not excluded:
        raise UsageError(f"{flag} {path}: it excludes no image (its verdicts hold no {WRONG!r}); leave {flag} out")
    return excluded
