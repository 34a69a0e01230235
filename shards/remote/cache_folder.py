"""Location of the user's cache: a folder on a local disk of the node, unless ISICDIST_CACHE names another.

Caches are locked with flock, memory-mapped and read in every epoch, all of which a network file system does slowly or
not at all. Home directories of clusters are network file systems as a rule, so that a job's temporary folder is used.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

NETWORK_FILE_SYSTEMS = frozenset(
    {"9p", "afs", "beegfs", "ceph", "cifs", "gfs2", "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "ocfs2", "orangefs"}
    | {"panfs", "pvfs2", "smb3", "smbfs", "virtiofs", "wekafs"}
)
"""Types of file systems whose files other machines can write, as /proc/self/mountinfo names them."""
LOCAL_FUSE = frozenset({"fuse.fuse-overlayfs", "fuse.ext2fs", "fuse.ntfs-3g"})
"""Types of FUSE file systems on a local disk; all others are taken for network file systems (sshfs, gcsfuse, ...)."""

_MOUNTS = Path("/proc/self/mountinfo")
_SHARED_MEMORY = Path("/dev/shm")


def cache_root() -> Path:
    """Give the user's cache folder; it need not exist yet.

    $ISICDIST_CACHE if set. Else $XDG_CACHE_HOME/isicdist or ~/.cache/isicdist, where that can be written and is not
    on a network file system. Else isicdist-UID in $SLURM_TMPDIR or $TMPDIR (or /tmp), the first that is local.
    """
    configured = os.environ.get("ISICDIST_CACHE")
    if configured:
        return Path(configured)
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "isicdist"  # noqa: PTH111
    usable = [home] if home.is_absolute() and _is_writable(home) else []  # relative: this user has no home
    if usable and not on_network(home):
        return home
    for parent in filter(None, (os.environ.get("SLURM_TMPDIR"), tempfile.gettempdir())):
        folder = Path(parent) / f"isicdist-{os.getuid()}"
        if _make_private(folder):
            usable.append(folder)
            if not on_network(folder):
                return folder
    return usable[0] if usable else home


def node_local_root() -> Path:
    """Give `cache_root`, or in its place a folder in /dev/shm where all that cache_root found is on the network.

    /dev/shm takes memory of the node: for what has a limit. $ISICDIST_CACHE is used wherever it lies.
    """
    root = cache_root()
    memory = _SHARED_MEMORY / f"isicdist-{os.getuid()}"
    if os.environ.get("ISICDIST_CACHE") or not on_network(root) or not _make_private(memory):
        return root
    return memory


def on_network(path: Path) -> bool:
    """Check for a path on a network file system, by the type of the innermost mount above it; False if not known."""
    try:
        mounts = _MOUNTS.read_text("utf-8", "surrogateescape")
        path = path.resolve()
    except (OSError, RuntimeError):  # not Linux; a loop of links
        return False
    kind, depth = "", -1
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        point = Path(_unescape(before.split()[4]))
        if len(point.parts) >= depth and path.is_relative_to(point):  # of two mounts at one point, the later is on top
            kind, depth = after.split()[0], len(point.parts)
    return kind in NETWORK_FILE_SYSTEMS or (kind.startswith("fuse.") and kind not in LOCAL_FUSE)


def _make_private(folder: Path) -> bool:
    """Make a folder of this user's in a folder that others can write; False if it cannot be, or is another user's.

    What lies in a cache is read without another check than its checksum, so that nobody else may write it.
    """
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022


def _is_writable(folder: Path) -> bool:
    """Check whether a folder can be written, or made in the nearest of its parents that exists."""
    try:
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    except (OSError, StopIteration):  # a parent that cannot be searched
        return False
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def _unescape(point: str) -> str:
    r"""Decode a mount point of mountinfo, where a space is \040."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        point = point.replace(code, character)
    return point
