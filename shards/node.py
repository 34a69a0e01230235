"""What a node keeps and can make again: where it lies, and how a file that nobody reads is removed.

Whoever reads such a file holds a shared lock on it (flock), which the kernel drops when its process dies.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def cache_root() -> Path:
    """$ISICDIST_CACHE, else $XDG_CACHE_HOME/isicdist, else ~/.cache/isicdist."""
    given = os.environ.get("ISICDIST_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "isicdist"


def evict(path: Path) -> bool:
    """Remove a file that no process reads; whether it is gone."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except BlockingIOError:
        return False
    except FileNotFoundError:  # somebody else was quicker
        pass
    return True
