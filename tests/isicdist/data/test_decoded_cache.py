"""The decoded cache: the same samples as without it, no decoding from the second epoch on, and no harm from a kill."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from isicdist.data import decoded_cache as decoded
from isicdist.data.decoded_cache import DecodedCache
from isicdist.data.order import BatchPlan
from isicdist.data.stream import Stream
from shards.errors import UsageError
from shards.reader import ShardSet, Split


@pytest.fixture
def split(shard_set: Path) -> Split:
    return ShardSet.open(shard_set).split("train")


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each sample has been decoded."""
    counts, sample = Counter[int](), Split.sample

    def counted(self: Split, number: int, image: np.ndarray, mask: np.ndarray) -> None:
        counts[number] += 1
        sample(self, number, image, mask)

    monkeypatch.setattr(Split, "sample", counted)
    return counts


def read_epoch(split: Split, cache: DecodedCache | None, world: int = 1, rank: int = 0) -> dict[int, bytes]:
    """The pixels of each sample, image and mask; of an epoch, some of the next one would be read ahead."""
    plan = BatchPlan(global_size=8, micro_size=4, world_size=world)
    pixels = {}
    with Stream(split, plan, rank, decoded=cache) as stream:
        for batch in stream.sequential_pass():
            for place in np.flatnonzero(batch.valid):
                image, mask = batch.images[place].contiguous().numpy(), batch.masks[place].numpy()
                pixels[int(batch.indices[place])] = image.tobytes() + mask.tobytes()
    return pixels


def test_samples_are_the_same_and_decoded_once(split, tmp_path, decodes):
    without = read_epoch(split, None)
    decodes.clear()
    cache = DecodedCache(split, tmp_path / "new" / "folder")
    assert read_epoch(split, cache) == without
    assert decodes == Counter(range(len(split)))
    for _ in range(2):
        assert read_epoch(split, cache) == without
    another_run = DecodedCache(split, tmp_path / "new" / "folder")
    assert read_epoch(split, another_run) == without
    assert decodes == Counter(range(len(split)))


def test_ranks_share_what_is_decoded(split, tmp_path, decodes):
    one = DecodedCache(split, tmp_path)
    other = DecodedCache(split, tmp_path)
    together = read_epoch(split, one, 2, 0) | read_epoch(split, other, 2, 1)
    assert decodes == Counter(range(len(split)))
    assert read_epoch(split, one) == read_epoch(split, other) == together
    assert decodes == Counter(range(len(split)))


@pytest.mark.parametrize("damage", ["cut short", "torn", "marker of a hole"])
def test_a_record_that_is_not_whole_is_decoded_again(split, tmp_path, decodes, damage):
    without = read_epoch(split, None)
    cache = DecodedCache(split, tmp_path)
    read_epoch(split, cache)
    record, path = decoded.record_bytes(64), cache.path
    data = bytearray(path.read_bytes())
    if damage == "cut short":
        del data[5 * record - record // 2 :]
    elif damage == "torn":
        data[4 * record + record // 2 : 5 * record] = bytes(record - record // 2)
    else:
        data[4 * record : 4 * record + 8] = bytes(8)
    path.write_bytes(data)
    decodes.clear()
    cache = DecodedCache(split, tmp_path)
    assert read_epoch(split, cache) == without
    assert decodes == Counter(range(4, len(split)) if damage == "cut short" else [4])
    assert read_epoch(split, cache) == without
    assert decodes.total() == (len(split) - 4 if damage == "cut short" else 1)


@pytest.mark.parametrize("grown", [False, True])
def test_a_file_that_is_cut_while_it_is_mapped_is_filled_again(split, tmp_path, decodes, grown):
    """Grown again, as by a job that opens it then, it has a hole where something was lost."""
    without = read_epoch(split, None)
    cache = DecodedCache(split, tmp_path)
    for _ in range(2):
        assert read_epoch(split, cache) == without
    decodes.clear()
    os.truncate(cache.path, 4 * decoded.record_bytes(64))
    if grown:
        os.truncate(cache.path, len(split) * decoded.record_bytes(64))
    for _ in range(3):
        assert read_epoch(split, cache) == without
    assert decodes == Counter(range(4, len(split)))


DIE_HALF_WAY = """
import os, sys
import numpy as np
from isicdist.data.decoded_cache import DecodedCache
from shards.reader import ShardSet

def half(file, buffers, offset):
    if offset == 3 * (8 + 4 * 64 * 64):
        write(file, [*buffers[:2], bytes(100)], offset)
        os.kill(os.getpid(), 9)
    return write(file, buffers, offset)

write, os.pwritev = os.pwritev, half
split = ShardSet.open(sys.argv[1]).split("train")
cache = DecodedCache(split, sys.argv[2])
for number in range(len(split)):
    cache.read(number, np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8))
"""


def test_a_process_that_is_killed_while_it_writes_does_no_harm(split, tmp_path, python, decodes):
    assert python("-c", DIE_HALF_WAY, split.root, tmp_path, anew=True).returncode == -9
    cache = DecodedCache(split, tmp_path)
    assert read_epoch(split, cache) == read_epoch(split, cache)
    assert decodes == Counter(range(3, len(split)))
    assert read_epoch(split, cache) == read_epoch(split, None)


def test_a_full_disk_is_said_once_and_the_samples_are_decoded(split, tmp_path, decodes, monkeypatch, capsys):
    without = read_epoch(split, None)
    decodes.clear()
    pwritev = os.pwritev

    def full(file: int, buffers: list, offset: int) -> int:
        if offset >= 5 * decoded.record_bytes(64):
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwritev(file, buffers, offset)

    monkeypatch.setattr(os, "pwritev", full)
    cache = DecodedCache(split, tmp_path)
    assert read_epoch(split, cache) == without
    assert read_epoch(split, cache) == without
    said = capsys.readouterr().err
    assert said.count("the disk is full") == 1
    assert str(tmp_path) in said
    assert {decodes[number] for number in range(5, len(split))} == {2}


def test_sets_and_splits_have_files_of_their_own(split, shard_set, tmp_path):
    val = ShardSet.open(shard_set).split("val")
    other = dataclasses.replace(split, digest="other")
    assert len({DecodedCache(each, tmp_path).path for each in (split, val, other)}) == 3


def test_auto_keeps_what_fits_comfortably(split, tmp_path, monkeypatch):
    monkeypatch.setenv("ISICDIST_CACHE", str(tmp_path))
    cache = DecodedCache.open("auto", split)
    assert cache is not None
    assert cache.path.parent == tmp_path / "decoded"
    assert DecodedCache.open("off", split) is None
    monkeypatch.setattr(decoded, "MEMORY_SHARE", 1 << 40)
    assert DecodedCache.open("auto", split) is None
    monkeypatch.setattr(decoded, "MEMORY_SHARE", 1)
    monkeypatch.setattr(decoded, "DISK_SHARE", 1 << 50)
    assert DecodedCache.open("auto", split)  # its room is taken already
    cache.path.unlink()
    assert DecodedCache.open("auto", split) is None
    cache = DecodedCache.open(str(tmp_path / "given"), split)
    assert cache is not None
    assert cache.path.parent == tmp_path / "given"


def test_auto_evicts_the_oldest_files_that_nobody_has_open(split, shard_set, tmp_path, monkeypatch):
    monkeypatch.setenv("ISICDIST_CACHE", str(tmp_path))
    sets = [dataclasses.replace(split, digest=name * 32) for name in "abc"]
    used, *unused = (DecodedCache.open("auto", each) for each in sets)
    assert used
    paths = [cache.path for cache in unused if cache]
    del unused
    for age, path in enumerate([used.path, *paths]):  # the one in use is the oldest
        os.utime(path, (age, age))
    needed = len(split) * decoded.record_bytes(64)

    def disk_usage(folder: Path) -> SimpleNamespace:
        return SimpleNamespace(free=decoded.DISK_SHARE * needed * (not paths[0].exists()))

    monkeypatch.setattr(decoded.shutil, "disk_usage", disk_usage)
    assert DecodedCache.open("auto", ShardSet.open(shard_set).split("train"))
    assert [path.exists() for path in (used.path, *paths)] == [True, False, True]


FAILURES = {"no locks": errno.ENOSYS, "no locks left": errno.ENOLCK, "read-only": errno.EROFS, "full": errno.ENOSPC}


@pytest.fixture(params=FAILURES)
def failing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file system on which no cache can be opened; the reason."""
    reason = os.strerror(FAILURES[request.param])

    def fail(*_: object, **__: object) -> None:
        raise OSError(FAILURES[request.param], reason)

    if "locks" in request.param:
        monkeypatch.setattr(decoded.fcntl, "flock", fail)
    else:
        monkeypatch.setattr(decoded.os, "ftruncate" if request.param == "full" else "open", fail)
    return reason


def test_auto_does_without_a_cache_that_cannot_be_had_and_says_so_once(
    split, shard_set, tmp_path, monkeypatch, failing, capsys
):
    monkeypatch.setenv("ISICDIST_CACHE", str(tmp_path))
    assert DecodedCache.open("auto", split) is None
    assert DecodedCache.open("auto", ShardSet.open(shard_set).split("val")) is None
    assert capsys.readouterr().err == (
        f"warning: {tmp_path / 'decoded'}: decoded samples cannot be cached there ({failing}); "
        "every epoch decodes them\n"
    )
    monkeypatch.setenv("ISICDIST_CACHE", str(tmp_path / "other"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert DecodedCache.open("auto", split) is None
    assert capsys.readouterr().err == ""


def test_a_given_folder_that_cannot_be_used_is_an_error_that_names_it(split, tmp_path, failing):
    folder = str(tmp_path / "given")
    with pytest.raises(OSError, match="decoded samples cannot be cached here") as raised:
        DecodedCache.open(folder, split)
    assert raised.value.filename == folder
    assert failing in str(raised.value)
    assert "--stream.decoded-cache" in str(raised.value)


def test_a_folder_that_is_a_file_is_an_error_that_names_it(split, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        DecodedCache.open(str(tmp_path / "file"), split)


def test_a_folder_below_a_file_does_not_stop_auto(split, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ISICDIST_CACHE", str(tmp_path / "file"))
    assert DecodedCache.open("auto", split) is None
    assert capsys.readouterr().err.count("\n") == 1


def test_every_read_on_a_network_file_system_is_verified(split, tmp_path, decodes, monkeypatch):
    """A page that was lost after it was written is noticed in the same process, though it has verified the record."""
    monkeypatch.setattr(decoded, "on_network", lambda path: True)
    without = read_epoch(split, None)
    decodes.clear()
    cache = DecodedCache(split, tmp_path)
    for _ in range(2):
        assert read_epoch(split, cache) == without
    assert decodes == Counter(range(len(split)))
    with cache.path.open("r+b") as file:
        file.seek(3 * decoded.record_bytes(64) + 4096)
        file.write(bytes(4096))
    assert read_epoch(split, cache) == without
    assert decodes == Counter(range(len(split))) + Counter([3])


def test_a_disk_that_fails_in_the_middle_costs_only_the_cache(split, tmp_path, decodes, monkeypatch, capsys):
    without = read_epoch(split, None)

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    cache = DecodedCache(split, tmp_path)
    monkeypatch.setattr(os, "pwritev", fail)
    monkeypatch.setattr(os, "preadv", fail)
    assert read_epoch(split, cache) == without
    assert capsys.readouterr().err == (
        f"warning: {cache.path}: Input/output error; the other samples are decoded each time\n"
    )


def test_images_of_their_own_sizes_are_not_kept(split, tmp_path):
    with pytest.raises(UsageError, match="differ in size"):
        DecodedCache(dataclasses.replace(split, size=None), tmp_path)


def test_a_record_that_was_written_in_part_is_not_read(split, tmp_path, decodes, monkeypatch):
    """A disk with room for half of it says so by the number of bytes."""
    without = read_epoch(split, None)
    pwritev = os.pwritev
    cache = DecodedCache(split, tmp_path)

    def half(file: int, buffers: list, offset: int) -> int:
        return pwritev(file, [buffers[0], bytes(buffers[1])[: 64 * 64]], offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwritev", half)
        assert read_epoch(split, cache) == without
    for _ in range(2):
        assert read_epoch(split, cache) == without


@pytest.mark.parametrize("place", [8, 8 + 3 * 64 * 64, 8 + 4 * 64 * 64 - 1])
def test_every_byte_of_image_and_mask_is_verified(split, tmp_path, decodes, place):
    without = read_epoch(split, None)
    cache = DecodedCache(split, tmp_path)
    read_epoch(split, cache)
    data = bytearray(cache.path.read_bytes())
    data[2 * decoded.record_bytes(64) + place] ^= 1
    cache.path.write_bytes(data)
    decodes.clear()
    assert read_epoch(split, DecodedCache(split, tmp_path)) == without
    assert decodes == Counter([2])


def test_the_file_is_the_user_s_own(split, tmp_path):
    cache = DecodedCache(split, tmp_path)
    assert cache.path.stat().st_mode & 0o077 == 0
    (tmp_path / "elsewhere").write_bytes(b"precious")
    linked = dataclasses.replace(split, digest="linked")
    (tmp_path / cache.path.name.replace(split.digest[:32], "linked")).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        DecodedCache(linked, tmp_path)
    assert (tmp_path / "elsewhere").read_bytes() == b"precious"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_nothing_more_is_written_once_the_disk_or_the_quota_is_full(split, tmp_path, monkeypatch, capsys, number):
    tried: list[int] = []

    def full(file: int, buffers: list, offset: int) -> int:
        tried.append(offset)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwritev", full)
    cache = DecodedCache(split, tmp_path)
    image, mask = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8)
    for index in range(4):
        cache.read(index, image, mask)
    assert len(tried) == 1
    assert "the disk is full" in capsys.readouterr().err
