"""The tar writer: webdataset's own, without the second and more that importing webdataset costs."""

from __future__ import annotations

import importlib
import importlib.util
import io
import sys
import threading
from functools import cache
from typing import Any

from shards import format


def packed(key: str, members: list[bytes]) -> memoryview:
    """A sample as it lies in a tar. `members`: as in `format.MEMBERS`; an empty one is left out."""
    named = {format.MEMBERS[i]: data for i, data in enumerate(members) if data}
    file = io.BytesIO()
    with load_writer().TarWriter(file, user="", group="", mode=0o444, mtime=0, compress=False, encoder=False) as tar:
        tar.write({"__key__": key, **named})
    return file.getbuffer()[: format.sample_bytes([len(data) for data in members])]  # without a tar's end


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
