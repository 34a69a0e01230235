"""Rows about whole runs: any number of ranks, resume, NCCL, scores, out of memory, a killed rank, a signal."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from benchmarks.gpu.kit import ONE_STEP, Kit, kill_tree
from benchmarks.gpu.rows import Outcome
from isicdist.run_folder import METRICS_NAME
from isicdist.training.tracking.metrics_file import read_metrics

COMPILED_LIMIT = 5e-2
"""Largest difference of a compiled run that is resumed: another process may compile other kernels."""


def float64_ranks(kit: Kit) -> Outcome:
    """Invariant 4: with the global batch fixed, a run is the same on any number of ranks, in float64 to 1e-9."""
    flags = {"steps": kit.sizes.half, "batch__global_size": 6, "optim__ema_decay": 0.9}
    flags |= {"augment__progressive_resize_fraction": 0.4}
    micro = {1: 6, 2: 2, 3: 1}
    runs: dict[int, Path] = {}
    for world in kit.sizes.worlds:
        words = kit.train_words(f"float64-{world}", kit.sizes.small, batch__micro_size=micro[world], **flags)
        kit.ranks(world, *words, options=("--dtype", "float64", "--deterministic"), precision="no")
        runs[world] = kit.work / f"float64-{world}"
    pairs = [(runs[1], runs[world]) for world in kit.sizes.worlds[1:]]
    losses, weights = (max(compare(*pair) for pair in pairs) for compare in (loss_difference, weight_difference))
    detail = f"losses within {losses:.1e}, weights within {weights:.1e}"
    # On a GPU the log's mean loss is kept in float32.
    assert losses <= (1e-6 if kit.gpus else 1e-9), detail
    assert weights <= 1e-9, detail
    return Outcome(detail=detail)


def resume(kit: Kit, precision: str, compiled: str) -> Outcome:
    """Invariant 4: a resumed run is the uninterrupted one, bit for bit; about so when compiled, in other kernels."""
    name, half = f"resume-{precision}-{compiled}", kit.sizes.half
    flags = {"steps": 2 * half, "checkpoint_every": half, "compile": compiled}
    whole, again = kit.work / name, kit.work / f"{name}-again"
    for run in (whole, again):
        words = kit.train_words(run.name, kit.sizes.small, **flags)
        kit.worker(*words, options=("--deterministic",), precision=precision, seconds=150)
        if run == whole:
            checkpoint = f"checkpoints/step-{half:08d}"
            shutil.copytree(whole / checkpoint, again / checkpoint)
    losses, weights = loss_difference(whole, again), weight_difference(whole, again)
    limit = COMPILED_LIMIT if compiled == "on" else 0.0
    detail = f"steps {half + 1} to {2 * half}: losses within {losses:.1e}, weights within {weights:.1e}"
    assert max(losses, weights) <= limit, detail
    return Outcome(detail=f"steps {half + 1} to {2 * half} are the same bit for bit" if limit == 0 else detail)


def nccl(kit: Kit) -> Outcome:
    """Train over NCCL on as many ranks as there are GPUs, and compare with one process."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(kit.gpus)]
    launch += ["-m", "--", "benchmarks.gpu.worker", "--deterministic", "--all-reduce"]
    kit.run(*launch, *kit.train_words("nccl", kit.sizes.small, steps=20), seconds=120)
    kit.worker(*kit.train_words("nccl-none", kit.sizes.small, steps=20), options=("--deterministic",), precision="no")
    far = loss_difference(kit.work / "nccl", kit.work / "nccl-none")
    limit = 0.0 if kit.gpus == 1 else 1e-2
    assert far <= limit, f"losses differ by {far:.1e} from those of one process"
    return Outcome(detail=f"{kit.gpus} rank(s), all-reduce of 13 MB a step: losses within {far:.1e} of one process")


def same_scores(kit: Kit) -> Outcome:
    """Invariant 6: evaluation gives the same integers for each image on 1 and 2 ranks."""
    run, data = kit.work / ONE_STEP, kit.shard_set(kit.sizes.medium)
    words = ["evaluate", "--data", str(data), "--checkpoint", str(run)]
    tables = []
    for world in (1, 2):
        kit.ranks(world, *words)
        tables.append((run / "evaluation" / "test" / "per_image.csv").read_text())
    assert tables[0] == tables[1], "per_image.csv differs between 1 and 2 ranks"
    return Outcome(detail=f"per_image.csv is the same for {len(tables[0].splitlines()) - 1} images")


def out_of_memory(kit: Kit) -> Outcome:
    """Give the run a small part of the GPU's memory: micro batches are halved, and the losses stay the same."""
    flags = {"steps": 4, "batch__global_size": 256}
    words = kit.train_words("memory", kit.sizes.medium, **flags)
    output = kit.worker(*words, options=("--memory-fraction", "0.06"), seconds=120)
    sizes = re.findall(r"out of memory in step \d+: now (\d+) samples at once", output)
    assert sizes, "256 images went through 6 % of the memory at once"
    kit.worker(*kit.train_words("memory-enough", kit.sizes.medium, batch__micro_size=16, **flags), seconds=120)
    far = loss_difference(kit.work / "memory", kit.work / "memory-enough")
    assert far <= 5e-2, f"losses differ by {far:.1e} from those with micro batches of 16"
    return Outcome(detail=f"micro batches of 256, {', '.join(sizes)}; losses within {far:.1e} of micro batches of 16")


def killed_rank(kit: Kit) -> Outcome:
    """Kill rank 1 of 2 in the middle of a run: the launcher ends with an error within a minute."""
    run = kit.work / "killed"
    words = kit.train_words(run.name, kit.sizes.small)
    with kit.started(*kit.launch_words(2), *words) as process:
        wait_for_first_step(run, process)
        rank = next(
            each for each in psutil.Process(process.pid).children(recursive=True) if each.environ().get("RANK") == "1"
        )
        rank.kill()
        start = time.monotonic()
        output = finish(process, 60)
    kit.log(("killed rank",), [output])
    assert process.returncode == 1, f"exit code {process.returncode}, expected 1"
    lost = "another rank has gone" in output
    assert lost or re.search(r"exitcode +: -9", output), "no line names the rank that was killed"
    seconds = time.monotonic() - start
    return Outcome(detail=f"exit code 1 after {seconds:.1f} s; {'both ranks' if lost else 'the launcher'} said why")


def stop_signal(kit: Kit) -> Outcome:
    """Send SIGUSR1 to a run: it ends with exit code 85, a checkpoint and RUN/REQUEUE."""
    run = kit.work / "stopped"
    words = kit.train_words(run.name, kit.sizes.small)
    worker = [sys.executable, "-m", "benchmarks.gpu.worker"]
    with kit.started(*worker, *words, env={"ACCELERATE_MIXED_PRECISION": kit.precision}) as process:
        wait_for_first_step(run, process)
        process.send_signal(signal.SIGUSR1)
        start = time.monotonic()
        output = finish(process, 60)
    kit.log(("stop signal",), [output])
    assert process.returncode == 85, f"exit code {process.returncode}, expected 85"
    assert (run / "REQUEUE").exists(), "no REQUEUE in the run's folder"
    saved = max((run / "checkpoints").iterdir()).name
    return Outcome(detail=f"exit code 85 after {time.monotonic() - start:.1f} s, {saved} and REQUEUE")


def wait_for_first_step(run: Path, process: subprocess.Popen[str], seconds: float = 90) -> None:
    """Wait until a run has logged a step."""
    end = time.monotonic() + seconds
    while not ((run / METRICS_NAME).exists() and (run / METRICS_NAME).stat().st_size):
        if process.poll() is not None or time.monotonic() > end:
            kill_tree(process)
            raise AssertionError(f"no step was made: {finish(process, 5)[-400:]}")
        time.sleep(0.05)


def finish(process: subprocess.Popen[str], seconds: float) -> str:
    """Wait for the end of a process; returns its output. Kills it after `seconds`."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        kill_tree(process)
        raise AssertionError(f"still there after {seconds:.0f} s") from None


def loss_difference(run: Path, other: Path) -> float:
    """Give the largest difference between the losses of two runs over the steps that both logged."""
    losses = [{event.step: event.loss for event in read_metrics(each / METRICS_NAME)[0]} for each in (run, other)]
    steps = losses[0].keys() & losses[1].keys()
    assert steps, "the runs have no logged step in common"
    return max(abs(losses[0][step] - losses[1][step]) for step in steps)


def weight_difference(run: Path, other: Path) -> float:
    """Give the largest difference between the weights of two runs at their last checkpoints."""
    return float((_last_weights(run) - _last_weights(other)).abs().max())


def _last_weights(run: Path) -> torch.Tensor:
    last = max((run / "checkpoints").glob("step-*"))
    weights = load_file(last / "model.safetensors")
    return torch.cat([weights[name].flatten().double() for name in sorted(weights)])
