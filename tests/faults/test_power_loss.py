"""A loss of power cannot be tried here. Its trace can: every publish is write, fsync, rename, fsync of the folder."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.conftest import FULL, Tally

pytestmark = pytest.mark.skipif(not FULL or shutil.which("strace") is None, reason="make test-faults, with strace")

CALL = re.compile(r"(?P<call>fsync|rename|renameat|renameat2|write|pwrite64)\((?P<rest>.*)")
PATH = re.compile(r"<(/[^>]*)>")
QUOTED = re.compile(r'"([^"]+)"')


def trace(folder: Path, *words: object) -> list[tuple[str, list[str]]]:
    """The calls of a command and its children that write, flush and rename, each with its paths, in order."""
    log = folder / "trace"
    calls = "trace=fsync,rename,renameat,renameat2,write,pwrite64"
    command = ["strace", "-f", "-y", "--seccomp-bpf", "-s", "0", "-e", calls, "-o", str(log), sys.executable, "-m"]
    env = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [*command, *map(str, words)], capture_output=True, text=True, timeout=200, check=False, env=env
    )
    assert done.returncode == 0, done.stderr
    found: list[tuple[str, list[str]]] = []
    for line in log.read_text(errors="replace").splitlines():
        call = CALL.search(line)
        if call:
            paths = QUOTED.findall(call["rest"]) if call["call"].startswith("rename") else PATH.findall(call["rest"])
            found.append((call["call"], paths))
    return found


def check_publishes(calls: list[tuple[str, list[str]]], out: Path) -> int:
    """Check every rename to a name that stays; how many there were."""
    published = 0
    for place, (call, paths) in enumerate(calls):
        if not call.startswith("rename") or not paths[-1].startswith(str(out)):
            continue
        source, target = paths[0], paths[-1]
        if Path(target).name.startswith(".") and Path(target).name.endswith(".old"):
            continue  # the earlier folder, which makes way
        if any(part.startswith(".") and part.endswith(".new") for part in Path(target).parent.parts):
            # Inside of a folder that is published later: what was written has this name from now on.
            for _, where in calls[:place]:
                where[:] = [target if each == source else each for each in where]
            continue
        published += 1
        within = [
            (number, name)
            for number, (name, where) in enumerate(calls[:place])
            if not name.startswith("rename") and where and (where[0] == source or where[0].startswith(f"{source}/"))
        ]
        assert within, f"{target}: renamed without an fsync"
        last = {where: name for number, name in within for where in calls[number][1][:1]}
        assert set(last.values()) == {"fsync"}, f"{target}: written after its fsync: {last}"
        folder = str(Path(target).parent)
        assert ("fsync", [folder]) in calls[place:], f"{target}: its folder is not flushed"
    return published


def test_every_writer_flushes_before_and_after_it_renames(archive: tuple[Path, Path], tmp_path: Path, tally: Tally):
    images, masks = archive
    data, run, out = tmp_path / "set", tmp_path / "run", tmp_path / "masks"
    small = ["--model.base-channels", "2", "--steps", "3", "--checkpoint-every", "1", "--eval-every", "1"]
    commands = {
        data: [
            "shards",
            "build",
            "--images",
            images,
            "--masks",
            masks,
            "--out",
            data,
            "--size",
            "64",
            "--workers",
            "2",
        ],
        run: ["isicdist", "train", "--data", data, "--run", run, "--recipe", "demo", "--tracker", "none", *small],
        run / "evaluation": ["isicdist", "evaluate", "--data", data, "--checkpoint", run],
        out: ["isicdist", "predict", "--images", images, "--checkpoint", run, "--out", out],
    }
    for place, words in commands.items():
        published = check_publishes(trace(tmp_path, *words), place)
        assert published > 2, words
        tally(f"publishes traced: {words[0]} {words[1]}", published)
