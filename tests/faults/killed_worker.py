"""`isicdist` that is killed or disturbed: python killed_worker.py FAULT ARGUMENTS...

FAULT is `reseed`: every global generator is seeded anew in each step; or `kill-N`: the one process, or rank 0 of
several, is killed before its N-th call that changes what is on the disk.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import isicdist.train
from isicdist.cli import main


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


if __name__ == "__main__":
    fault, *arguments = sys.argv[1:]
    if fault == "reseed":
        reseed()
    elif os.environ.get("RANK", "0") == "0":
        kill_before(int(fault.removeprefix("kill-")))
    main(arguments)
