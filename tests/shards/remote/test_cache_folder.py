"""The location of the cache: on a local disk of the node, writable, and of this user alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shards.remote import cache_folder
from shards.remote.cache_folder import cache_root, node_local_root, on_network

MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
23 22 0:40 / {0}/home rw,relatime shared:2 - nfs4 server:/home rw,vers=4.2
24 23 8:2 / {0}/home/local\\040disk rw - xfs /dev/sdb1 rw
25 22 0:41 / {0}/scratch rw - lustre mgs:/scratch rw
26 22 0:42 / {0}/sshfs rw - fuse.sshfs host:/ rw
27 22 0:43 / {0}/rootless rw - fuse.fuse-overlayfs fuse-overlayfs rw
28 22 0:44 / {0}/twice rw - nfs server:/ rw
29 28 0:45 / {0}/twice rw - tmpfs tmpfs rw
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with these mounts below a folder, and a user whose home is on NFS."""
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS.format(tmp_path))
    monkeypatch.setattr(cache_folder, "_MOUNTS", mounts)
    monkeypatch.setattr(cache_folder, "_SHARED_MEMORY", tmp_path / "shm")
    for name in ("home/me", "home/local disk", "scratch", "tmp", "shm"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("ISICDIST_CACHE", "XDG_CACHE_HOME", "SLURM_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home/me"))
    monkeypatch.setattr(cache_folder.tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path


def test_network_file_systems_are_known_by_the_innermost_mount(machine: Path) -> None:
    local = ("", "home/local disk/a", "homely", "rootless", "twice", "tmp")
    assert [name for name in local if on_network(machine / name)] == []
    network = ("home", "home/me/not/yet/there", "home/local", "scratch/a", "sshfs")
    assert [name for name in network if not on_network(machine / name)] == []
    (machine / "link").symlink_to(machine / "scratch")
    assert on_network(machine / "link" / "a")


def test_without_a_table_of_mounts_everything_is_local(machine: Path) -> None:
    (machine / "mountinfo").unlink()
    assert not on_network(machine / "home")


def test_the_environment_comes_first(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISICDIST_CACHE", str(machine / "scratch"))
    assert cache_root() == machine / "scratch"
    monkeypatch.delenv("ISICDIST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(machine / "b"))
    assert cache_root() == machine / "b" / "isicdist"


def test_a_local_home_is_used(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(machine / "home/local disk"))
    assert cache_root() == machine / "home/local disk/.cache/isicdist"


def test_a_home_on_the_network_gives_way_to_the_disk_of_the_node(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = f"isicdist-{os.getuid()}"
    assert cache_root() == machine / "tmp" / own
    assert (machine / "tmp" / own).stat().st_mode & 0o777 == 0o700
    (machine / "job").mkdir()
    monkeypatch.setenv("SLURM_TMPDIR", str(machine / "job"))
    assert cache_root() == machine / "job" / own
    monkeypatch.setenv("SLURM_TMPDIR", str(machine / "scratch"))
    assert cache_root() == machine / "tmp" / own, "the temporary folder of the job is on Lustre"


def test_shared_memory_is_for_a_node_without_any_local_disk(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = f"isicdist-{os.getuid()}"
    assert node_local_root() == machine / "tmp" / own
    monkeypatch.setattr(cache_folder.tempfile, "tempdir", str(machine / "scratch"))
    assert node_local_root() == machine / "shm" / own
    with monkeypatch.context() as configured:
        configured.setenv("ISICDIST_CACHE", str(machine / "scratch/a"))
        assert node_local_root() == machine / "scratch/a"
    assert cache_root() == machine / "home/me/.cache/isicdist", (
        "downloads have no limit, so that memory is not for them"
    )
    (machine / "shm" / own).rmdir()
    (machine / "shm").rmdir()
    assert node_local_root() == machine / "home/me/.cache/isicdist"


@pytest.mark.parametrize("foreign", ["writable by others", "link", "file"])
def test_a_temporary_folder_that_others_could_fill_is_not_used(machine: Path, foreign: str) -> None:
    folder = machine / "tmp" / f"isicdist-{os.getuid()}"
    if foreign == "writable by others":
        folder.mkdir()
        folder.chmod(0o777)
    elif foreign == "link":
        folder.symlink_to(machine)
    else:
        folder.touch()
    assert cache_root() == machine / "home/me/.cache/isicdist"


@pytest.mark.parametrize("home", ["file", ""])
def test_a_user_without_a_home_has_a_cache(machine: Path, monkeypatch: pytest.MonkeyPatch, home: str) -> None:
    (machine / "file").touch()
    monkeypatch.setenv("HOME", str(machine / home) if home else "~nobody")
    assert cache_root() == machine / "tmp" / f"isicdist-{os.getuid()}"
