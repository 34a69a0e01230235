"""Tar arithmetic: a sample is byte for byte what webdataset's writer makes."""

from __future__ import annotations

import io

import pytest
from webdataset.writer import TarWriter

from shards import format, layout
from shards.layout import pieces


@pytest.mark.parametrize(
    ("key", "members"),
    [
        ("ISIC_0000000", [b"j" * 512, b"{}", b"m" * 513, b""]),
        ("k" * 80, [b"j", b"{}", b"m", b"o" * 100_000]),
    ],
)
def test_a_sample_is_byte_by_byte_what_webdatasets_own_writer_makes(key, members):
    file = io.BytesIO()
    with TarWriter(file, user="", group="", mode=0o444, mtime=0, compress=False, encoder=False) as tar:
        tar.write({"__key__": key, **{name: data for name, data in zip(format.MEMBERS, members, strict=True) if data}})
    sample = b"".join(pieces(key, members))
    assert len(sample) == layout.sample_bytes([len(data) for data in members])
    assert file.getvalue()[: len(sample)] == sample
