"""Check the machines: versions, devices, launcher, network, cores, caches, and with a shard set the speed of a run.

A check tries a thing rather than compare its version where it can: ranks all-reduce, the cache is written and locked,
a JPEG is encoded and decoded. Under `accelerate launch` every rank checks itself, and rank 0 prints one table.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console

from isicdist.doctor import machine, software
from isicdist.doctor.check import INSTALL, Check
from isicdist.doctor.table import merge_ranks, render

if TYPE_CHECKING:
    from accelerate import Accelerator

TIMEOUT = 60.0
"""Seconds after which a collective of the doctor fails."""


def run_doctor(data: str | None = None, *, as_json: bool = False) -> int:
    """Print every check on stdout; return the exit code, 1 if a run would fail, else 0. Every rank calls it.

    The checks are a table, or with `as_json` one object: `{"ok": true, "checks": [{"name": ..., "state": ...,
    "found": ..., "advice": ..., "numbers": {...}}, ...]}`, without the numbers where a check has none. `data`: a shard
    set to measure the speed of a run on.
    """
    accelerator = _start() if software.is_launched(os.environ) else None
    of_ranks = [run_checks(data, accelerator)]
    if accelerator:
        from accelerate.utils import gather_object

        of_ranks = gather_object(of_ranks)
    results = merge_ranks(of_ranks)
    ok = all(check.state != "fail" for check in results)
    if accelerator is None or accelerator.is_main_process:
        _print(results, ok=ok, as_json=as_json)
    if accelerator:
        accelerator.end_training()
    return 0 if ok else 1


def run_checks(data: str | None = None, accelerator: Accelerator | None = None) -> list[Check]:
    """Run all checks of this rank, in the order of the table. A check that raises has failed."""
    results: list[Check] = []
    for name, check in _checks(accelerator):
        results.extend(_attempt(name, check))
    link = next((check.numbers for check in results if check.name == "all-reduce" and check.numbers), None)
    if data and link:

        def throughput() -> Iterator[Check]:
            from isicdist.doctor.throughput import check_throughput

            return check_throughput(data, link)

        results.extend(_attempt("data", throughput))
    return results


def _checks(accelerator: Accelerator | None) -> list[tuple[str, Callable[[], Iterator[Check]]]]:
    """List the checks in order. A check of several ranks is a collective, so that the order is that of all ranks."""

    def network() -> Iterator[Check]:
        from isicdist.doctor import network  # it needs torch, which may be what is wrong

        if accelerator:
            yield from network.check_rendezvous(accelerator)
            yield from network.check_interface()
        yield from network.check_link(accelerator)
        if accelerator:
            yield from network.check_clocks(accelerator)

    return [
        ("versions", software.check_versions),
        ("devices", machine.check_devices),
        ("cores", machine.check_cores),
        ("open files", machine.check_open_files),
        ("memory and disk", machine.check_memory_and_disk),
        ("cache", machine.check_cache),
        ("all-reduce", network),
        ("launch", software.check_launcher),
        ("environment", software.check_environment),
        ("JPEG", software.check_jpeg),
        ("wandb mode", software.check_wandb),
    ]


def _attempt(name: str, check: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    try:
        yield from check()
    except Exception as error:  # shown in the table next to the other results
        from shards.errors import ToolkitError

        ours = isinstance(error, ToolkitError)
        line = " ".join((str(error) if ours else f"{type(error).__name__}: {error}").split())
        yield Check(name=name, state="fail", found=line, advice="a run would end so, too" if ours else INSTALL)


def _start() -> Accelerator:
    """Form the process group as a run does. Raises UsageError where the launch cannot work, TrainingError."""
    from isicdist.distributed import launch
    from isicdist.distributed.agree import raise_on_lost_rank
    from isicdist.network.cpu_precision import faster_cpu_precision

    with raise_on_lost_rank():
        return launch.start(TIMEOUT, probe_cpu=faster_cpu_precision)


def _print(results: list[Check], *, ok: bool, as_json: bool) -> None:
    if not as_json:
        Console().print(render(results))
        return
    rows: list[dict[str, Any]] = []
    for check in results:
        row = dataclasses.asdict(check)
        rows.append(row if check.numbers else {name: value for name, value in row.items() if name != "numbers"})
    print(json.dumps({"ok": ok, "checks": rows}, indent=1))
