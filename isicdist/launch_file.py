"""Launch files for `accelerate launch` and SLURM: listed, read and written from a checkout or an installed wheel."""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from isicdist.settings_file import did_you_mean
from shards.errors import UsageError
from shards.files import write_file

SUFFIXES = (".yaml", ".sbatch")


def launch_files() -> dict[str, str]:
    """Map the name of each launch file to its file name: gpu8 to gpu8.yaml, slurm to slurm.sbatch."""
    names = sorted(entry.name for entry in _folder().iterdir() if entry.name.endswith(SUFFIXES))
    return {Path(name).stem: name for name in names}


def read_launch_file(name: str) -> str:
    """Read a launch file by its name, with or without its suffix. Raises UsageError for an unknown name."""
    files = launch_files()
    stem = name.removesuffix(".yaml").removesuffix(".sbatch")
    if stem not in files:
        raise UsageError(f"no launch file {name!r}{did_you_mean(stem, list(files))}; there are: {', '.join(files)}")
    return (_folder() / files[stem]).read_text("utf-8")


def write_launch_file(name: str, out: Path) -> None:
    """Write a launch file to `out`. Raises UsageError for an unknown name, or if `out` exists."""
    text = read_launch_file(name)
    if out.exists():  # it may have been edited
        raise UsageError(f"{out}: exists already; remove it, or give another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, text.encode())


def _folder() -> Traversable:
    """Locate the launch files: inside the package in a wheel, next to it in a checkout (see pyproject.toml)."""
    installed = resources.files("isicdist") / "launch_files"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "launch"
