"""The bytes of a sample in a tar shard, as webdataset's own writer lays them out, and where each member begins."""

from __future__ import annotations

import tarfile

from shards import format

BLOCK = 512  # bytes: a tar header, and what bodies are padded to
SHARD_END = 10240  # bytes: a tar is padded to a multiple of its record


def padded(size: int) -> int:
    """The bytes that a member's body of `size` bytes takes in a tar."""
    return -(-size // BLOCK) * BLOCK


def sample_bytes(sizes: list[int]) -> int:
    """The bytes that a sample takes in a tar, headers and padding included. An absent member has size 0."""
    return sum(BLOCK + padded(size) for size in sizes if size)


def shard_bytes(content: int) -> int:
    """The length of a tar whose samples take `content` bytes: two empty blocks, then up to a full record."""
    return -(-(content + 2 * BLOCK) // SHARD_END) * SHARD_END


def member_spans(offset: int, sizes: list[int]) -> list[tuple[int, int]]:
    """(first byte, length) in the shard of each member's body, for a sample that begins at `offset`."""
    spans = []
    for size in sizes:
        spans.append((offset + BLOCK, size))
        offset += BLOCK + padded(size) if size else 0
    return spans


def pieces(key: str, members: list[bytes]) -> list[bytes]:
    """The headers, bodies and paddings of a sample in their order; no body is copied.

    `members`: as in `format.MEMBERS`; an empty one is left out. Together they have `layout.sample_bytes`.
    """
    found = []
    for name, data in zip(format.MEMBERS, members, strict=True):
        if data:
            found += [_header(f"{key}.{name}", len(data)), data, bytes(padded(len(data)) - len(data))]
    return found


_EMPTY = tarfile.TarInfo()  # mtime, uid and gid 0, no names of user and group
_EMPTY.mode = 0o444
_HEADER = _EMPTY.tobuf(tarfile.USTAR_FORMAT)


def _header(name: str, size: int) -> bytes:
    """tarfile's own header with its name, size and checksum (POSIX 1003.1, ustar) put in: a tenth of tarfile's time."""
    header = bytearray(_HEADER)
    header[: len(name)] = name.encode()
    header[124:136] = b"%011o\0" % size
    header[148:156] = b" " * 8  # as which the checksum's own field counts
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)
