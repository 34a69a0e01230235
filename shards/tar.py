"""A sample as it lies in a tar, byte by byte as webdataset's own writer makes it."""

from __future__ import annotations

import tarfile

from shards import format


def pieces(key: str, members: list[bytes]) -> list[bytes]:
    """The headers, bodies and paddings of a sample in their order; no body is copied.

    `members`: as in `format.MEMBERS`; an empty one is left out. Together they have `format.sample_bytes`.
    """
    found = []
    for name, data in zip(format.MEMBERS, members, strict=True):
        if data:
            found += [_header(f"{key}.{name}", len(data)), data, bytes(format.padded(len(data)) - len(data))]
    return found


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)  # mtime, uid and gid 0, no names of user and group
    info.size, info.mode = size, 0o444
    return info.tobuf(tarfile.USTAR_FORMAT)
