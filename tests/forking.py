"""Run programs in forks of one process that has imported torch and this project, which takes seven seconds of a CPU.

Under a launcher it is torchrun's own agent that forks the ranks: its entry point is a function instead of a command.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import sys
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 240
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "tests.forking",
        "accelerate.commands.launch",
        "torch.distributed.run",
        "torch._dynamo",  # which the first optimizer of a process imports
        "isicdist.crossval",
        "isicdist.evaluate",
        "isicdist.predict",
        "isicdist.train",
    ]
)


def run(words: list[str], launcher: list[str], env: dict[str, str], folder: Path) -> int:
    """Run `python WORDS`, under `accelerate launch LAUNCHER` if there are such words; returns the exit code.

    It is minus the number of a signal. What is printed goes to the files `stdout` and `stderr` of `folder`.
    """
    process = CONTEXT.Process(target=_child, args=(words, launcher, env, folder))
    process.start()
    try:
        process.join(TIMEOUT_SECONDS)
        if process.exitcode is None:
            raise TimeoutError(f"{words}: still running after {TIMEOUT_SECONDS} s")
        return process.exitcode
    finally:
        process.kill()  # if it runs yet; its ranks get a SIGINT then


def _child(words: list[str], launcher: list[str], env: dict[str, str], folder: Path) -> None:
    os.chdir(Path(__file__).parent.parent)
    os.environ.clear()
    os.environ.update(env)
    for number, name, errors in ((1, "stdout", "strict"), (2, "stderr", "backslashreplace")):
        with (folder / name).open("wb") as file:
            os.dup2(file.fileno(), number)
        encoding = env.get("PYTHONIOENCODING", "utf-8")
        setattr(sys, name, open(number, "w", buffering=1, encoding=encoding, errors=errors, closefd=False))  # noqa: SIM115
    if launcher:
        _launch(launcher, words)
    else:
        _program(*words)


def _launch(launcher: list[str], words: list[str]) -> None:
    from accelerate.commands import launch
    from torch.distributed import run

    from_arguments = run.config_from_args

    def with_forks(arguments: Any) -> tuple[Any, Any, list[str]]:
        config, _, _ = from_arguments(arguments)
        config.start_method = "fork"
        return config, _program, words

    run.config_from_args = with_forks
    sys.argv = ["accelerate-launch", *launcher, *words]
    launch.main()


def _program(*words: str) -> None:
    """Do what `python WORDS` does."""
    try:
        if words[0] == "-m":
            sys.argv = list(words[1:])
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(words)
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
