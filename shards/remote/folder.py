"""Download files from a folder behind a URL, with a bounded number of retries."""

from __future__ import annotations

import errno
import hashlib
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fsspec.callbacks import Callback
from fsspec.core import url_to_fs

from shards.errors import CorruptShardError, ShardSetError, ToolkitError, UsageError
from shards.format import FileEntry
from shards.urls import is_transient, without_password

MAX_ATTEMPTS = 10  # at one file
MAX_CORRUPT_ATTEMPTS = 2  # at a file that arrives complete, but with other bytes
STALL_TIMEOUT_SECONDS = 12.0  # without a byte of one file, over all attempts; then its server is given up
READ_TIMEOUT_SECONDS = 4.0  # without a byte, which ends one attempt
MIN_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 0.1, 3.0  # between attempts; doubled from one to the next
LOCAL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EMFILE})  # not the server's

T = TypeVar("T")


class RemoteFolder:
    """A folder behind a URL of any protocol that fsspec reads. Threads may share it."""

    def __init__(self, url: str) -> None:
        """Open the file system; nothing is read yet. Raises UsageError when it or what it needs is not installed."""
        self.url = url.rstrip("/")
        self.location = without_password(self.url)
        """The URL without a password: for messages."""
        try:
            self._filesystem, root = url_to_fs(self.url, **_timeout_options(self.url))
            self._root = str(root)
        except (ImportError, ValueError) as error:
            raise UsageError(
                f"{self.location}: cannot be read ({error}); http needs: pip install 'isicdist[remote]', "
                "s3 needs s3fs, gs needs gcsfs"
            ) from error
        self._given_up_at = -math.inf
        """When a thread last gave up the server. For STALL_TIMEOUT_SECONDS it then gets one attempt at a file, until
        one succeeds: the server is not waited for again by every file."""

    def read(self, name: str) -> bytes:
        """Read a small file. Raises ShardSetError with the URL and the reason."""
        return self._with_retries(name, lambda progress: self._filesystem.cat_file(f"{self._root}/{name}"))

    def download(self, entry: FileEntry, to: Path) -> None:
        """Download a file to `to`, and check its length and sha256.

        Raises ShardSetError with the URL and the reason, CorruptShardError when the server has other bytes, which `to`
        then holds, and OSError with the filename `to` when this machine cannot store it.
        """

        def attempt(progress: _ProgressWatch) -> None:
            progress.max_bytes = entry.bytes
            try:
                self._filesystem.get_file(f"{self._root}/{entry.name}", str(to), callback=progress)
            except OSError as error:
                if error.errno in LOCAL_ERRNOS:
                    error.filename = str(to)
                raise
            _check_download(to, entry)

        self._with_retries(entry.name, attempt)

    def _with_retries(self, name: str, attempt: Callable[[_ProgressWatch], T]) -> T:
        """Call `attempt` until it succeeds, with exponential backoff.

        Not a library's retry loop, because the time limit counts silence instead of attempts (a slow download of a
        large shard is no failure), and because all files of a server share the decision to give up.
        """
        attempts, backoff, stalled = 1, MIN_BACKOFF_SECONDS, 0.0
        while True:
            progress = _ProgressWatch()
            try:
                result = attempt(progress)
                self._given_up_at = -math.inf
                return result
            except Exception as error:  # each protocol has exceptions of its own
                if isinstance(error, OSError) and error.errno in LOCAL_ERRNOS:
                    raise
                stalled += time.monotonic() - progress.last_byte_at + backoff
                if not _is_retryable(error, attempts):
                    raise self._failure(name, error, attempts) from error
                now = time.monotonic()
                given_up = now - self._given_up_at < STALL_TIMEOUT_SECONDS
                if given_up or attempts == MAX_ATTEMPTS or stalled > STALL_TIMEOUT_SECONDS:
                    self._given_up_at = now
                    raise self._failure(name, error, attempts) from error
            time.sleep(backoff * random.uniform(0.5, 1))  # jitter: not all ranks at the same moment
            attempts, backoff = attempts + 1, min(2 * backoff, MAX_BACKOFF_SECONDS)

    def _failure(self, name: str, error: Exception, attempts: int) -> ToolkitError:
        url = f"{self.location}/{name}"
        if isinstance(error, _WrongBytesError | _TruncatedError):
            return CorruptShardError(f"{url}: {error}; copy the set there again or rebuild it", shard=name)
        if isinstance(error, FileNotFoundError):
            return ShardSetError(f"{url}: there is no such file; check the URL of the set")
        why = str(error).replace(self.url, self.location) or type(error).__name__
        times = f" after {attempts} attempts" if attempts > 1 else ""
        return ShardSetError(f"{url}: not fetched, given up{times} ({why}); run the same command again later")


class _WrongBytesError(Exception):
    """A file that is complete but is not the one of the index, or that does not end."""


class _TruncatedError(OSError):
    """A file that ended too early without an error of the protocol: cut off in transit, or another file."""


class _ProgressWatch(Callback):
    """Records when the last byte of an attempt arrived, and ends a download that exceeds `max_bytes`."""

    def __init__(self) -> None:
        super().__init__()
        self.last_byte_at = time.monotonic()
        self.max_bytes = 0

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        if inc:
            self.last_byte_at = time.monotonic()
        if self.value > self.max_bytes:  # it might never end
            raise _WrongBytesError(f"more than the {self.max_bytes} bytes that the index names")


def _is_retryable(error: Exception, attempts: int) -> bool:
    """True if another attempt after `attempts` may succeed."""
    if isinstance(error, _WrongBytesError):
        return attempts < MAX_CORRUPT_ATTEMPTS
    return is_transient(error)


def _timeout_options(url: str) -> dict[str, Any]:
    """Give fsspec's options for timeouts of HTTP; other protocols have their own defaults."""
    if not url.startswith(("http://", "https://")):
        return {}
    import aiohttp

    seconds = READ_TIMEOUT_SECONDS
    return {"timeout": aiohttp.ClientTimeout(total=None, connect=seconds, sock_connect=seconds, sock_read=seconds)}


def _check_download(path: Path, entry: FileEntry) -> None:
    """Raise _TruncatedError for a file that is too short, _WrongBytesError for other bytes."""
    size = path.stat().st_size
    if size < entry.bytes:
        raise _TruncatedError(f"{size} of {entry.bytes} bytes came")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
            raise _WrongBytesError("not the bytes that the index names")
