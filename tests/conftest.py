"""What several tests share: small sets made by the project itself, and the real data where it lies beside us."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests import forking

ROOT = Path(__file__).parent.parent
REAL = ROOT.parent / "shared" / "data"

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "disabled"  # but where a test is about it

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reads or writes the user's own cache."""
    os.environ["ISICDIST_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real ISIC data; tests that want it are skipped where it is not."""
    if not REAL.is_dir():
        pytest.skip("the real ISIC data does not lie beside the project")
    return REAL


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """48 generated images and masks, laid out like the ISIC archives."""
    from isicdist.data.synthetic import synthesize

    return synthesize(tmp_path_factory.mktemp("archive") / "isic", 48, size=(96, 160))


@pytest.fixture(scope="session")
def shard_set(tmp_path_factory: pytest.TempPathFactory, archive: tuple[Path, Path]) -> Path:
    """A set of 64 x 64 images in small shards."""
    from shards.build import BuildOptions, build

    out = tmp_path_factory.mktemp("sets") / "set"
    options = BuildOptions(size=64, samples_per_shard=7, split="train=0.6,val=0.2,test=0.2")
    build(str(archive[0]), str(archive[1]), out, options)
    return out


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Run `python ARGS` as a user would, on one process or (`processes`) under `accelerate launch`.

    In a fork of a process that has imported torch, or in a new interpreter (`anew`): where it matters what happens
    while it starts, and for `-c`.
    """

    def run(
        *words: object,
        processes: int = 1,
        env: Mapping[str, str] | None = None,
        precision: str = "no",
        anew: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        launcher: list[str] = []
        if processes > 1:
            launcher = ["--multi_gpu", "--num_machines", "1", "--num_processes", str(processes)]
            launcher += ["--main_process_port", "0", "--mixed_precision", precision]
        merged = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **(env or {})}
        program = [str(word) for word in words]
        if not anew:
            folder = tmp_path_factory.mktemp("printed")
            code = forking.run(program, launcher, merged, folder)
            return subprocess.CompletedProcess(
                program, code, *((folder / name).read_text() for name in ("stdout", "stderr"))
            )
        command = [sys.executable]
        if launcher:
            command += ["-m", "accelerate.commands.launch", *launcher]
        command += program
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=merged, timeout=240, check=False)

    return run
