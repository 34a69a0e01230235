"""Reuse of freed memory by the C library."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4
"""Parameters of `set_malloc`: bytes, and for the last one a number of blocks (malloc.h)."""
_RETAINED = 256 << 20  # bytes
_TOP_PAD = 16 << 20


def retain_freed_memory() -> None:
    """Let glibc's malloc retain up to 256 MB that are freed, for this process from now on; nothing on other systems.

    By default it returns the memory of each decoded picture to the system, which has to clear every page when the next
    picture asks for it: a quarter of the time of encoding a pair of 3 megapixels.
    """
    most = 32 << 20  # that malloc accepts as this threshold
    set_malloc({M_MMAP_THRESHOLD: most, M_TRIM_THRESHOLD: _RETAINED, M_TOP_PAD: _TOP_PAD})


def set_malloc(parameters: Mapping[int, int]) -> None:
    """Set parameters of glibc's malloc (`mallopt`) for this process, in their order; nothing on other systems."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is not None:  # musl has none
        for parameter, value in parameters.items():
            mallopt(parameter, value)
