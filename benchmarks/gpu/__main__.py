"""Check and measure everything on this machine's GPU, in less than ten minutes.

    python -m benchmarks.gpu --data ARCHIVES --out FOLDER

ARCHIVES is a folder with the two .zip archives of ISIC 2018 Task 1 (*Input*.zip, *GroundTruth*.zip); without it images
are generated. FOLDER/gpu.md holds one table, gpu.json the same with all numbers, gpu.log the output of all commands.
The exit code is 1 when a row failed. See README.md next to this file.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import accelerate
import torch

import isicdist
from benchmarks.gpu import bare, checks, kernels, runs, speed
from benchmarks.gpu.kit import FULL, SHORT, Kit
from benchmarks.gpu.rows import Outcome, Report, Row, run_row
from isicdist.data.synthetic import synthesize
from isicdist.distributed import launch

ROW_SECONDS = 120.0
"""Limit of one row of the bare step, its compilation included: one that hangs does not take those after it along."""

WORK_BYTES = 8 * 2**30
"""Shard sets, decoded caches and runs take less."""
GENERATED = {True: 64, False: 2594}
"""Images that are generated where no archives are given, by `short`."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One row that the kit itself makes; the others come from child processes."""

    name: str
    function: Callable[[Kit], Outcome]
    gpu: bool = False
    """The row needs a GPU."""


def correctness_tasks(kit: Kit) -> list[Task]:
    """Give the rows about whole runs, the longest first; they do not depend on each other and run at the same time."""
    resume = {
        "resume, bf16, compiled": functools.partial(runs.resume, precision="bf16", compiled="on"),
        **{
            f"resume, {'float32' if precision == 'no' else precision}": functools.partial(
                runs.resume, precision=precision, compiled="off"
            )
            for precision in kit.sizes.precisions
        },
    }
    return [
        *(Task(name=name, function=function, gpu="compiled" in name) for name, function in resume.items()),
        Task(name=f"float64 on {', '.join(map(str, kit.sizes.worlds))} ranks", function=runs.float64_ranks),
        Task(name="out of memory", function=runs.out_of_memory, gpu=True),
        Task(name="same scores on 1 and 2 ranks", function=runs.same_scores),
        Task(name="nccl", function=runs.nccl, gpu=True),
        Task(name="killed rank", function=runs.killed_rank),
        Task(name="stop signal", function=runs.stop_signal),
    ]


def speed_tasks() -> list[Task]:
    """Give the rows about throughput; each has the GPU to itself."""
    loops: dict[str, dict[str, object]] = {
        "loop": {},
        "loop, compiled": {"compile": "on"},
        "loop, decoding in 2 threads": {"stream__decoded_cache": "off", "stream__workers": 2},
        "loop, decoding in 8 threads": {"stream__decoded_cache": "off", "stream__workers": 8},
    }
    return [
        *(
            Task(name=name, function=functools.partial(speed.loop, name=name, **flags), gpu=bool(flags))
            for name, flags in loops.items()
        ),
        Task(name="targets", function=speed.targets, gpu=True),
        Task(name="epochs, batch of 8", function=functools.partial(speed.epochs, batch=8)),
        Task(name="epochs, batch of 128", function=functools.partial(speed.epochs, batch=128), gpu=True),
        Task(name="evaluate", function=speed.evaluate),
        Task(name="predict", function=speed.predict),
    ]


def run_task(kit: Kit, task: Task) -> None:
    """Report one row, unless it needs what is not there."""
    if task.gpu and not kit.gpus:
        return kit.report.add(Row(name=task.name, result="needs a GPU"))
    if kit.remaining < 5:
        return kit.not_run([task.name])
    kit.report.add(run_row(task.name, functools.partial(task.function, kit)))


def run_checks(kit: Kit, selected: Callable[[str], bool]) -> None:
    """Report the rows of `benchmarks.gpu.checks`: a process per precision and one that compiles, at the same time."""
    names = list(filter(selected, checks.CHECKS))
    if not kit.gpus:
        for name in filter(checks.GPU_ONLY.__contains__, names):
            kit.report.add(Row(name=name, result="needs a GPU"))
        names = [name for name in names if name not in checks.GPU_ONLY]
    words = ("--data", str(kit.shard_set(kit.sizes.small)))
    if not has_compiler(kit):
        for name in filter(checks.COMPILED_ONLY.__contains__, names):
            kit.report.add(Row(name=name, result="needs a compiler"))
        names = [name for name in names if name not in checks.COMPILED_ONLY]
    groups: dict[tuple[str, bool], list[str]] = {}
    for name in names:
        precision = next((each for each in ("bf16", "fp16") if name.endswith(each)), "no")
        groups.setdefault((precision, name in checks.COMPILED_ONLY), []).append(name)
    with ThreadPoolExecutor(kit.sizes.jobs) as pool:
        jobs = [
            pool.submit(
                kit.child_rows,
                "benchmarks.gpu.checks",
                these,
                *words,
                seconds=240 if compiled else 120,
                env={"ACCELERATE_MIXED_PRECISION": precision},
            )
            for (precision, compiled), these in groups.items()
        ]
    for job in jobs:
        job.result()


def has_compiler(kit: Kit) -> bool:
    """Tell whether torch.compile has what it needs: on a GPU as a run finds it, a C++ compiler on a CPU."""
    if kit.gpus:
        return launch.lacking_for_compile(torch.device("cuda", 0)) is None
    return shutil.which("c++") is not None


def run_bare(kit: Kit, variants: dict[str, bare.Variant], module: str = "benchmarks.gpu.bare") -> None:
    """Report rows about variants of the bare step, by their names, one process per precision."""
    for precision in dict.fromkeys(variant.precision for variant in variants.values()):
        names = [name for name, variant in variants.items() if variant.precision == precision]
        environment = {"ACCELERATE_MIXED_PRECISION": precision}
        kit.child_rows(module, names, "--sets", str(kit.work), seconds=ROW_SECONDS, env=environment)


def run_all(kit: Kit, selected: Callable[[str], bool]) -> None:
    """Report every row: what the device computes, how fast the step is, whole runs, and their throughput."""
    sides = dict.fromkeys((kit.sizes.small, kit.sizes.medium, kit.sizes.large))
    for side in sides:  # other rows need them
        run_task(kit, Task(name=f"build, {side} pixels", function=functools.partial(speed.build, side=side)))
    run_task(kit, Task(name="train one step", function=speed.one_step))
    run_checks(kit, selected)
    first, others = ([*bare.FIRST], [*bare.OTHERS]) if kit.gpus else ([*bare.SHORT], [])
    profiled = [bare.COMPILED, bare.CHANNELS_LAST] if kit.gpus else bare.SHORT
    run_bare(kit, {each.name: each for each in first if selected(each.name)})
    names = {kernels.row_name(each): each for each in profiled}
    run_bare(kit, {name: each for name, each in names.items() if selected(name)}, "benchmarks.gpu.kernels")
    with ThreadPoolExecutor(kit.sizes.jobs) as pool:
        jobs = [pool.submit(run_task, kit, task) for task in correctness_tasks(kit) if selected(task.name)]
    for job in jobs:
        job.result()
    tasks = [task for task in speed_tasks() if selected(task.name)]
    with ThreadPoolExecutor(1 if kit.gpus else kit.sizes.jobs) as pool:  # on a CPU nothing is measured in earnest
        list(pool.map(functools.partial(run_task, kit), tasks))
    run_bare(kit, {each.name: each for each in others if selected(each.name)})


def sources(data: Path | None, work: Path, *, short: bool) -> tuple[str, str]:
    """Find the two archives, or generate images and masks."""
    if data is None:
        size = (64, 96) if short else (256, 384)
        images, masks = synthesize(work / "generated", GENERATED[short], size=size)
        return str(images), str(masks)
    found = [sorted(data.glob(pattern)) for pattern in ("*Input*.zip", "*GroundTruth*.zip")]
    if [len(each) for each in found] != [1, 1]:
        sys.exit(f"{data}: there must be one *Input*.zip and one *GroundTruth*.zip in it")
    return str(found[0][0]), str(found[1][0])


def header(gpus: int) -> dict[str, str]:
    """Give date, device and versions."""
    device = f"{gpus} x {torch.cuda.get_device_name()}" if gpus else f"CPU {platform.machine()}"
    versions = {"python": platform.python_version()}
    versions |= {each.__name__: each.__version__ for each in (torch, accelerate, isicdist)}
    if gpus:
        nccl = ".".join(map(str, torch.cuda.nccl.version()))  # pyright: ignore[reportAttributeAccessIssue]
        versions |= {"CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version()), "NCCL": nccl}
    return {"date": str(date.today()), "device": device, "cores": str(os.cpu_count()), **versions}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the two .zip archives")
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.md, gpu.json and gpu.log")
    parser.add_argument("--short", action="store_true", help="small sizes on the CPU, in about two minutes")
    parser.add_argument("--budget-s", type=float, default=480, help="seconds after which the other rows are not run")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="REGEX", help="only rows whose name matches one of these patterns"
    )
    options = parser.parse_args()
    deadline = time.monotonic() + options.budget_s
    gpus = 0 if options.short else torch.cuda.device_count()
    if not gpus and not options.short:
        parser.error("there is no GPU; --short runs on a CPU")
    memory = Path("/dev/shm")  # a file system in memory: the disk is not the subject
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > WORK_BYTES
    with tempfile.TemporaryDirectory(dir=memory if roomy and gpus else None) as folder:
        work = Path(folder)
        images, masks = sources(options.data, work, short=options.short)
        report = Report(options.out, header(gpus))
        kit = Kit(
            images=images,
            masks=masks,
            work=work,
            report=report,
            sizes=SHORT if options.short else FULL,
            gpus=gpus,
            deadline=deadline,
        )
        with contextlib.suppress(KeyboardInterrupt):
            run_all(kit, lambda name: any(re.search(text, name) for text in options.only))
    print(report.markdown())
    return int(any(row.result == "failed" for row in report.rows))


if __name__ == "__main__":
    sys.exit(main())
