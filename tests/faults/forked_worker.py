"""Runs of `isicdist train`, each in a fork of one process that has imported everything once.

    python forked_worker.py DATA OUT SPEC...

Each SPEC is run in OUT/SPEC: `whole`; `reseed`, with every global generator seeded anew in each step; `kill-N`, where
the process is killed before the N-th call that changes what is on the disk, and the run is then started again.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # pyright: ignore[reportUnusedImport]  # as making an optimizer does: once, not in every fork

import isicdist.train
from isicdist.cli import main

WORDS = ["--steps", "6", "--epochs", "9", "--eval-every", "3", "--checkpoint-every", "2", "--keep", "1"]
WORDS += ["--batch.global-size", "6", "--model.base-channels", "2", "--optim.ema-decay", "0.9", "--log-every", "1"]


def kill_before(number: int) -> None:
    calls = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapper

    for module, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (shutil, "rmtree")):
        setattr(module, name, counted(getattr(module, name)))


def reseed() -> None:
    keys = isicdist.train.random_keys

    def wrapper(seed: int, counter: int, *args: Any) -> Any:
        torch.manual_seed(counter)
        np.random.seed(counter)
        random.seed(counter)
        return keys(seed, counter, *args)

    isicdist.train.random_keys = wrapper


def forked(arguments: list[str], fault: Callable[[], None]) -> int:
    """How a run in a child process ends: its exit code, or minus the signal that killed it."""
    child = os.fork()
    if not child:
        fault()
        main(arguments)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    data, out, *specs = sys.argv[1:]
    for spec in specs:
        arguments = ["train", "--data", data, "--run", str(Path(out) / spec), *WORDS]
        kind, _, number = spec.partition("-")
        if kind == "kill":
            ended = forked(arguments, lambda n=int(number): kill_before(n))
            assert ended == -signal.SIGKILL, f"{spec}: {ended}"
        ended = forked(arguments, reseed if kind == "reseed" else lambda: None)
        assert ended == 0, f"{spec}: {ended}"
