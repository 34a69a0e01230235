"""Check the machine of this rank: GPUs and precision, cores, open files, shared memory, disk and cache."""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from isicdist.doctor.check import GIB, Check
from shards.parallel.processes import available_cores
from shards.remote.cache_folder import node_local_root, on_network

_MIN_OPEN_FILES = 1024
_PROBE_BYTES = 2**24  # written to the cache to measure its speed


def check_devices() -> Iterator[Check]:
    """Look for GPUs, bf16 on the device that trains, and NCCL."""
    import torch
    from torch import distributed
    from torch.cuda import nccl

    from isicdist.network.cpu_precision import probe_cpu_precision

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        unused_gpu = torch.version.cuda is None and Path("/dev/nvidia0").exists()
        yield Check(
            name="GPUs",
            state="warn" if unused_gpu else "ok",
            found="a GPU, but this torch is built for the CPU" if unused_gpu else "none; training runs on the CPU",
            advice="install torch's CUDA build" if unused_gpu else "",
        )
        probed = probe_cpu_precision()
        if not probed.gain:
            found = "not in this CPU: float32 is used instead"
        elif probed.precision == "bf16":
            found = f"used where asked for: a training step is {probed.gain:.2f} times as fast as in float32"
        else:
            found = f"float32 is used instead: in bf16 a training step is {probed.gain:.2f} times as fast"
        yield Check(name="bf16", state="ok", found=found)
        return
    names = sorted({torch.cuda.get_device_name(index) for index in range(count)})
    yield Check(name="GPUs", state="ok", found=f"{count}: {', '.join(names)}")
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    yield Check(
        name="bf16",
        state="ok" if bf16 else "warn",
        found="supported" if bf16 else "not in this GPU's hardware",
        advice="" if bf16 else "accelerate launch --mixed_precision fp16",
    )
    available = distributed.is_nccl_available()
    yield Check(
        name="nccl",
        state="ok" if available else "warn" if count == 1 else "fail",
        found=".".join(map(str, nccl.version())) if available else "not in this torch",
        advice="" if available else "install torch's CUDA build for Linux to train on several GPUs",
    )


def check_cores() -> Iterator[Check]:
    """Compare the cores of this rank's share of the machine with OMP_NUM_THREADS and with its decoding threads."""
    cores, ranks = available_cores(), int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    threads = os.environ.get("OMP_NUM_THREADS", "")
    fits = not threads or (threads.isdecimal() and 1 <= int(threads) <= cores)
    setting = (
        f"OMP_NUM_THREADS={threads} for each process" if threads else "OMP_NUM_THREADS not set: the launcher decides"
    )
    advice = "" if fits else "unset OMP_NUM_THREADS, or set it to cores / processes"
    if ranks > cores:  # a rank decodes on threads of its own beside the one that trains
        advice = "give each rank a core or more; under SLURM: srun --cpus-per-task=$SLURM_CPUS_PER_TASK"
    yield Check(
        name="cores",
        state="warn" if advice else "ok",
        found=f"{cores}{f' for {ranks} ranks' if ranks > 1 else ''}; {setting}",
        advice=advice,
        numbers={"cores": cores},
    )


def check_open_files() -> Iterator[Check]:
    """Read the limit of open files: a rank has a few hundred open, for shards, connections and threads."""
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = limit == resource.RLIM_INFINITY or limit >= _MIN_OPEN_FILES
    yield Check(
        name="open files",
        state="ok" if enough else "warn",
        found="no limit" if limit == resource.RLIM_INFINITY else f"at most {limit}",
        advice="" if enough else f"ulimit -n {min(65536, hard) if hard > 0 else 65536}",
    )


def check_memory_and_disk() -> Iterator[Check]:
    """Measure the shared memory that NCCL uses, and the free space of the current folder."""
    shared_memory = Path("/dev/shm")
    if shared_memory.is_dir():
        size = shutil.disk_usage(shared_memory).total / GIB
        yield Check(
            name="/dev/shm",
            state="ok" if size >= 1 else "warn",
            found=f"{size:.1f} GiB",
            advice="" if size >= 1 else "GPUs exchange gradients through it: docker run --shm-size 8g",
        )
    free = shutil.disk_usage(Path.cwd()).free / GIB
    yield Check(
        name="disk",
        state="ok" if free >= 5 else "warn" if free >= 0.5 else "fail",
        found=f"{free:.1f} GiB free here",
        advice="" if free >= 5 else "make room: shards, checkpoints and wandb's files need some GiB",
    )


def check_cache() -> Iterator[Check]:
    """Measure the folder of downloads and decoded samples: free space, speed, locks, local or on the network."""
    root = node_local_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root) as probe:
            start = time.perf_counter()
            probe.write(bytes(_PROBE_BYTES))
            probe.flush()
            os.fsync(probe.fileno())
            speed = _PROBE_BYTES / (time.perf_counter() - start)
            fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = shutil.disk_usage(root).free
    except OSError as error:
        found = f"{root}: cannot be used ({error.strerror or error})"
        yield Check(name="cache", state="warn", found=found, advice="export ISICDIST_CACHE=FOLDER, on a local disk")
        return
    network = on_network(root)
    advice = "each node needs a local folder: export ISICDIST_CACHE=FOLDER" if network else ""
    if free < GIB:
        advice = "make room, or export ISICDIST_CACHE=FOLDER on another disk"
    yield Check(
        name="cache",
        state="warn" if advice else "ok",
        found=f"{root}: {'on the network' if network else 'local'}, {free / GIB:.1f} GiB free, "
        f"writes {speed / 1e6:.0f} MB/s, locks",
        advice=advice,
        numbers={"free_bytes": free, "write_bytes_per_s": speed},
    )
