"""What the rows share: sizes, folders, the time budget, and commands in processes of their own with a time limit."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.gpu.rows import DEVICE_LOST, Report, Row, parse

ROOT = Path(__file__).resolve().parents[2]
ONE_STEP = "one-step"
"""Run of one step, of which rows use the model."""
SHOWN_LINES = 3
"""Last lines of a failed command that its row shows."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large the checks are: `FULL` for a GPU, `SHORT` for a CPU and continuous integration."""

    small: int
    medium: int
    large: int
    """Sides of the three shard sets in pixels; equal ones are built once."""
    channels: int
    """Base channels of the network."""
    batch: int
    """Global batch size where the row does not name another."""
    steps: int
    """Steps of a throughput run."""
    half: int
    """Steps of a resumed run before and after its checkpoint."""
    worlds: tuple[int, ...]
    """World sizes that are compared in float64."""
    precisions: tuple[str, ...]
    """Mixed precisions in which a resumed run is compared with the whole one."""
    jobs: int
    """Correctness rows that run at the same time."""


FULL = Sizes(
    small=128,
    medium=256,
    large=512,
    channels=16,
    batch=64,
    steps=150,
    half=20,
    worlds=(1, 2, 3),
    precisions=("bf16", "fp16"),
    jobs=6,
)
SHORT = Sizes(
    small=48, medium=48, large=48, channels=2, batch=4, steps=6, half=2, worlds=(1, 2), precisions=("no",), jobs=2
)


class CommandError(Exception):
    """A command ended with another exit code than expected, or took too long."""

    def __init__(self, reason: str, code: int) -> None:
        super().__init__(reason)
        self.code = code
        """Exit code; negative: the signal that ended the command."""


@dataclass(frozen=True, kw_only=True)
class Kit:
    """One run of the kit."""

    images: str
    """Folder or .zip archive of images."""
    masks: str
    """Folder or .zip archive of masks."""
    work: Path
    """Folder for shard sets and runs."""
    report: Report
    sizes: Sizes
    gpus: int
    """GPUs of this machine; 0: everything runs on the CPU."""
    deadline: float
    """End of the time budget, on the clock of `time.monotonic`."""

    @property
    def remaining(self) -> float:
        """Seconds of the time budget that are left."""
        return self.deadline - time.monotonic()

    @property
    def precision(self) -> str:
        """Mixed precision of the runs that are not about precision."""
        return "bf16" if self.gpus else "no"

    def shard_set(self, side: int) -> Path:
        """Give the folder of the shard set with images of `side` pixels."""
        return self.work / f"set-{side}"

    def train_words(self, run: str, side: int, **flags: Any) -> list[str]:
        """Give the arguments of `isicdist train` for a run below the work folder; `optim__lr=1` means --optim.lr 1."""
        defaults = {"epochs": 999, "eval_every": 9999, "checkpoint_every": 9999, "log_every": 1, "compile": "off"}
        defaults |= {"batch__global_size": self.sizes.batch, "model__base_channels": self.sizes.channels}
        defaults |= {"tracker": "none"}
        words = ["train", "--data", str(self.shard_set(side)), "--run", str(self.work / run)]
        for name, value in {**defaults, **flags}.items():
            words += ["--" + name.replace("__", ".").replace("_", "-"), str(value)]
        return words

    def worker(
        self, *words: str, options: tuple[str, ...] = (), precision: str | None = None, seconds: float = 90
    ) -> str:
        """Run an `isicdist` command on one process; returns its output."""
        command = [sys.executable, "-m", "benchmarks.gpu.worker", *options, *words]
        return self.run(*command, seconds=seconds, env={"ACCELERATE_MIXED_PRECISION": precision or self.precision})

    def ranks(
        self, world: int, *words: str, options: tuple[str, ...] = (), precision: str | None = None, seconds: float = 120
    ) -> str:
        """Run an `isicdist` command on `world` ranks over gloo, which share the first GPU; returns the output."""
        if world == 1:
            return self.worker(*words, options=options, precision=precision, seconds=seconds)
        return self.run(*self.launch_words(world, precision), *options, *words, seconds=seconds)

    def launch_words(self, world: int, precision: str | None = None) -> list[str]:
        """Give the command that launches the worker on several ranks over gloo."""
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
        launch += ["--num_processes", str(world), "--main_process_port", "0", "--dynamo_backend", "no"]
        return [*launch, "--mixed_precision", precision or self.precision, "-m", "benchmarks.gpu.worker", "--gloo"]

    def run(self, *words: str, seconds: float, env: Mapping[str, str] | None = None) -> str:
        """Run a command; returns stdout and stderr together. Raises CommandError as `lines` does."""
        return "".join(self.lines(*words, seconds=seconds, env=env))

    def lines(self, *words: str, seconds: float, env: Mapping[str, str] | None = None) -> Iterator[str]:
        """Run a command and yield its output line by line.

        Raises CommandError for an exit code other than 0, or after `seconds`, which are counted anew after each row
        that the command prints, or at the end of the time budget.
        """
        output: list[str] = []
        with self.started(*words, env=env) as process:
            timer, limit, start = self._kill_later(process, seconds)
            try:
                for line in process.stdout or ():
                    output.append(line)
                    if parse(line):
                        timer.cancel()
                        timer, limit, start = self._kill_later(process, seconds)
                    yield line
                code = process.wait()
            finally:
                timer.cancel()
                self.log(words, output)
        if code:
            late = time.monotonic() - start >= limit
            reason = f"stopped after {limit:.0f} s" if late else f"exit code {code}"
            raise CommandError(": ".join(filter(None, [reason, last_words(output)])), code)

    def _kill_later(self, process: subprocess.Popen[str], seconds: float) -> tuple[threading.Timer, float, float]:
        """Start the timer that kills a process; returns it, its limit in seconds and the time at which it began."""
        limit = max(0.1, min(seconds, self.remaining))
        timer = threading.Timer(limit, kill_tree, [process])
        timer.start()
        return timer, limit, time.monotonic()

    @contextlib.contextmanager
    def started(self, *words: str, env: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
        """Start a command for the length of the context; its processes are killed at the end."""
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        common = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
        common["ISICDIST_CACHE"] = str(self.work / "cache")
        common |= {} if self.gpus else {"ACCELERATE_USE_CPU": "true"}
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env={**os.environ, **common, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        try:
            yield process
        finally:
            kill_tree(process)
            if process.stdout:
                process.stdout.close()

    def child_rows(self, module: str, names: list[str], *words: str, seconds: float, env: Mapping[str, str]) -> None:
        """Report the rows that `python -m MODULE WORDS --names NAMES` prints.

        Where the process dies, the row it was at has failed, and another process goes on with the next one; so it does
        after a row that has lost the device.
        """
        names = list(names)
        while names:
            if self.remaining < 5:
                return self.not_run(names)
            error, before = "ended without a result", len(names)
            try:
                command = [sys.executable, "-m", module, *words, "--names", *names]
                for line in self.lines(*command, seconds=seconds, env=env):
                    if row := parse(line):
                        self.report.add(row)
                        names.remove(row.name)
            except CommandError as failure:
                if failure.code == DEVICE_LOST and len(names) < before:
                    continue
                error = str(failure)
            if names and self.remaining > 5:
                self.report.add(Row(name=names.pop(0), result="failed", detail=error))

    def not_run(self, names: list[str]) -> None:
        """Report rows for which no time is left."""
        for name in names:
            self.report.add(Row(name=name, result="not run", detail="the time budget is spent"))

    def log(self, words: tuple[str, ...], output: list[str]) -> None:
        """Append a command and its output to FOLDER/gpu.log."""
        with (self.report.folder / "gpu.log").open("a") as file:
            file.write(f"$ {shlex.join(words)}\n{''.join(output)}\n")


def last_words(output: list[str]) -> str:
    """Give the error messages in the output of a command, or else its last lines."""
    output = [line for line in output if not parse(line)]
    errors = [line for line in output if re.search(r"\berror: |Error: ", line)]
    return " / ".join(line.strip() for line in (errors or output)[-SHOWN_LINES:])


def kill_tree(process: subprocess.Popen[str]) -> None:
    """Kill a process and all below it: the ranks of a launcher have sessions of their own."""
    below: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        below = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for each in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()
