"""The tar writer: webdataset's own, without the second and more that importing webdataset costs."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import IO, Any, BinaryIO, cast

from shards import format


@contextmanager
def tar_writer(file: IO[bytes]) -> Iterator[Callable[[str, list[bytes]], None]]:
    """A function that appends a sample to a tar: called with its key and its members, as in `format.MEMBERS`."""
    with load_writer().TarWriter(
        cast(BinaryIO, file), user="", group="", mode=0o444, mtime=0, compress=False, encoder=False
    ) as tar:

        def write(key: str, members: list[bytes]) -> None:
            named = {format.MEMBERS[i]: data for i, data in enumerate(members) if data}
            tar.write({"__key__": key, **named})

        yield write


_loading = threading.Lock()  # a Dask worker may have several threads


@cache
def load_writer() -> Any:
    """The module webdataset.writer, without the package's `__init__`; call it once before processes are forked.

    The package imports torch, which takes longer than a small build; the writer needs tarfile and NumPy only. Its
    modules leave `sys.modules` again, so that `import webdataset` gets the whole package wherever it is wanted.
    """
    with _loading:
        if "webdataset" in sys.modules:
            return importlib.import_module("webdataset.writer")
        spec = importlib.util.find_spec("webdataset")
        assert spec is not None
        sys.modules["webdataset"] = importlib.util.module_from_spec(spec)
        try:
            return importlib.import_module("webdataset.writer")
        finally:
            for name in [name for name in sys.modules if name.partition(".")[0] == "webdataset"]:
                del sys.modules[name]
