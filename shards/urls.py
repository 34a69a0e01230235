"""Reach files behind fsspec URLs: each of the many errors becomes one line, without the password of the URL."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from shards.errors import ToolkitError

RETRYABLE_HTTP_STATUS = frozenset({408, 425, 429})  # of 4xx: request timeout, too early, too many requests
BACKOFF_SECONDS = (0.25, 1.0, 3.0)
"""Waits of `retry` between its attempts."""

T = TypeVar("T")


def filesystem_of(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it. Raises ImportError or ValueError where there is none."""
    from fsspec.core import url_to_fs

    filesystem, path = cast(tuple[Any, str], url_to_fs(url))
    return filesystem, path.rstrip("/")


def without_password(text: str) -> str:
    """Leave user and password out of the URLs in a text, for messages."""
    return re.sub(r"//[^/@\s]*@", "//", text)


@contextmanager
def reach(
    url: str,
    action: str,
    advice: str = "check the URL and your rights",
    *,
    passing: tuple[type[Exception], ...] = (),
) -> Generator[None]:
    """Raise whatever the file system of a URL raises in a block as ToolkitError of one line, but for `passing`.

    `action` is the participle for the message, as in "cannot be listed".
    """
    try:
        yield
    except (ToolkitError, *passing):
        raise
    except Exception as error:  # each protocol has exceptions of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ToolkitError(without_password(f"{url}: cannot be {action} ({reason}); {advice}")) from error


def retry(attempt: Callable[[], T]) -> T:
    """Call `attempt` again where it fails for a reason that may pass, such as a lost connection."""
    for seconds in BACKOFF_SECONDS:
        try:
            return attempt()
        except Exception as error:  # each protocol has exceptions of its own
            if not is_transient(error):
                raise
        time.sleep(seconds)
    return attempt()


def is_transient(error: Exception) -> bool:
    """True if another attempt may succeed."""
    status = getattr(error, "status", 0)  # of HTTP
    if 400 <= status < 500:
        return status in RETRYABLE_HTTP_STATUS
    return not isinstance(error, FileNotFoundError | PermissionError | NotImplementedError | TypeError)
