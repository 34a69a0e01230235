"""Read the files of a folder behind a URL: again and again where the network fails, but not for ever."""

from __future__ import annotations

import errno
import hashlib
import math
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fsspec.callbacks import Callback
from fsspec.core import url_to_fs

from shards.errors import CorruptShardError, ShardSetError, ToolkitError, UsageError

ATTEMPTS = 10  # at one file
WRONG_ATTEMPTS = 2  # at a file that arrives whole, but with other bytes
PATIENCE = 12.0  # seconds without a byte at one file, over all attempts, after which its server is given up
READ_TIMEOUT = 4.0  # seconds without a byte that end one attempt
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 3.0  # seconds between attempts; doubled from one to the next
TRY_LATER = frozenset({408, 425, 429})  # the HTTP answers of 4xx that may be another one next time
OF_THIS_NODE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EMFILE})

T = TypeVar("T")


class RemoteFolder:
    """A folder behind a URL of any protocol that fsspec reads. Threads may share it."""

    def __init__(self, url: str) -> None:
        """Nothing is read yet. Raises UsageError when the protocol, or what it needs installed, is not known."""
        self.url = url.rstrip("/")
        self.location = re.sub(r"//[^/@]*@", "//", self.url)
        """The URL without a password: for messages."""
        try:
            self._filesystem, self._root = url_to_fs(self.url, **_options(self.url))
        except (ImportError, ValueError) as error:
            raise UsageError(
                f"{self.location}: cannot be read ({error}); http needs: pip install 'isicdist[remote]', "
                "s3 needs s3fs, gs needs gcsfs"
            ) from error
        self._given_up = -math.inf
        """When any thread gave the server up; for PATIENCE seconds it gets one attempt at a file, until one is good."""

    def read(self, name: str) -> bytes:
        """The bytes of a small file. Raises ShardSetError that says which URL failed how."""
        return self._with_retries(name, lambda heard: self._filesystem.cat_file(f"{self._root}/{name}"))

    def fetch(self, name: str, to: Path, size: int, sha256: str) -> None:
        """Copy a file to `to`, which is whole and has that many bytes and that hash when this returns.

        Raises ShardSetError that says which URL failed how; CorruptShardError when another file lies there, which
        `to` then holds; OSError that names `to` when this machine has no room for it.
        """

        def attempt(heard: _ProgressWatch) -> None:
            heard.most = size
            try:
                self._filesystem.get_file(f"{self._root}/{name}", str(to), callback=heard)
            except OSError as error:
                if error.errno in OF_THIS_NODE:
                    error.filename = str(to)
                raise
            _check(to, size, sha256)

        self._with_retries(name, attempt)

    def _with_retries(self, name: str, attempt: Callable[[_ProgressWatch], T]) -> T:
        """What `attempt` returns, when one of several does."""
        number, pause, silent = 1, FIRST_PAUSE, 0.0
        while True:
            heard = _ProgressWatch()
            try:
                result = attempt(heard)
                self._given_up = -math.inf
                return result
            except Exception as error:  # each protocol has exceptions of its own
                if isinstance(error, OSError) and error.errno in OF_THIS_NODE:
                    raise
                silent += time.monotonic() - heard.last + pause
                if not _is_retryable(error, number):
                    raise self._failure(name, error, number) from error
                now = time.monotonic()
                if now - self._given_up < PATIENCE or number == ATTEMPTS or silent > PATIENCE:
                    self._given_up = now
                    raise self._failure(name, error, number) from error
            time.sleep(pause * random.uniform(0.5, 1))  # not all ranks at the same moment
            number, pause = number + 1, min(2 * pause, LONGEST_PAUSE)

    def _failure(self, name: str, error: Exception, number: int) -> ToolkitError:
        url = f"{self.location}/{name}"
        if isinstance(error, CorruptShardError | _CutOffError):
            return CorruptShardError(f"{url}: {error}; copy the set there again or rebuild it")
        if isinstance(error, FileNotFoundError):
            return ShardSetError(f"{url}: there is no such file; check the URL of the set")
        why = str(error).replace(self.url, self.location) or type(error).__name__
        times = f" after {number} attempts" if number > 1 else ""
        return ShardSetError(f"{url}: not fetched, given up{times} ({why}); run the same command again later")


class _CutOffError(OSError):
    """A file ended too early without a complaint of the protocol: cut off on its way, or another file."""


class _ProgressWatch(Callback):
    """When the last byte of an attempt came, or the attempt began; and not more bytes than there should be."""

    def __init__(self) -> None:
        super().__init__()
        self.last = time.monotonic()
        self.most = 0

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        if inc:
            self.last = time.monotonic()
        if self.value > self.most:  # it might never end
            raise CorruptShardError(f"more than the {self.most} bytes that the index names")


def _is_retryable(error: Exception, number: int) -> bool:
    """Whether another attempt may end otherwise, after `number` of them."""
    if isinstance(error, CorruptShardError):
        return number < WRONG_ATTEMPTS
    status = getattr(error, "status", 0)  # HTTP's
    if 400 <= status < 500:
        return status in TRY_LATER
    return not isinstance(error, FileNotFoundError | PermissionError | NotImplementedError | TypeError)


def _options(url: str) -> dict[str, Any]:
    """What fsspec is told of time limits; other protocols than HTTP have their own."""
    if not url.startswith(("http://", "https://")):
        return {}
    import aiohttp

    return {
        "timeout": aiohttp.ClientTimeout(
            total=None, connect=READ_TIMEOUT, sock_connect=READ_TIMEOUT, sock_read=READ_TIMEOUT
        )
    }


def _check(path: Path, size: int, sha256: str) -> None:
    """Raises _CutOffError for a file that is too short, CorruptShardError for other bytes."""
    got = path.stat().st_size
    if got < size:
        raise _CutOffError(f"{got} of {size} bytes came")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise CorruptShardError("not the bytes that the index names")
