"""Kernels of the bare step by the time that the device spends in them.

    python -m benchmarks.gpu.kernels --sets FOLDER --names "kernels, 64 x 256, bf16, compiled" ...

On a CPU, where the kit runs in its short form, the operators by their time on the CPU.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import torch
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import bare
from benchmarks.gpu.rows import Kernel, Outcome, emit_rows

WARM_UP = 3
"""Steps before those that are profiled: the first one compiles."""
STEPS = 5
"""Steps that are profiled."""
KEPT = 40
"""Kernels of a row, those that take the most time."""


def row_name(variant: bare.Variant) -> str:
    """Name the row of a variant of the bare step."""
    return variant.name.replace("bare step", "kernels", 1)


def profiled(variant: bare.Variant, sets: Path) -> Outcome:
    """Profile STEPS steps in a row; calls and milliseconds are those of one step."""
    cuda = torch.cuda.is_available()
    with bare.started(variant, sets) as step:
        bare.timed(step, WARM_UP)
        with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
            step_s = bare.timed(step, STEPS) / STEPS
    on = DeviceType.CUDA if cuda else DeviceType.CPU
    kernels = [
        Kernel(
            name=each.key,
            calls=each.count / STEPS,
            ms=(each.self_device_time_total if cuda else each.self_cpu_time_total) / 1e3 / STEPS,
        )
        for each in profiler.key_averages()
        if each.device_type == on and not each.is_user_annotation  # a span that has kernels in it
    ]
    assert kernels, "the profiler has seen no kernel"
    kernels.sort(key=lambda each: each.ms, reverse=True)
    values = {
        "step_ms": 1e3 * step_s,
        "kernels_ms": sum(each.ms for each in kernels),
        "calls": sum(each.calls for each in kernels),
    }
    detail = "{kernels_ms:.2f} ms in {calls:.0f} kernels of a profiled step of {step_ms:.2f} ms".format(**values)
    return Outcome(result="measured", detail=detail, values=values, kernels=kernels[:KEPT])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=Path, required=True, help="folder of the shard sets set-128, set-256, ...")
    parser.add_argument("--names", nargs="+", required=True, help="rows, all of one precision")
    options = parser.parse_args()
    by_name = {row_name(variant): variant for variant in (bare.COMPILED, bare.CHANNELS_LAST, *bare.SHORT)}
    emit_rows({name: functools.partial(profiled, by_name[name], options.sets) for name in options.names})


if __name__ == "__main__":
    main()
