"""Environment variables that launchers, accelerate and torch read: what is accepted, overruled or refused.

A variable left over in a shell must not change a run unnoticed. `read_environment` accepts what a launcher sets,
refuses in one line what this toolkit does not do (DeepSpeed, FSDP, fp8, dynamo or gradient accumulation by variable,
ranks of MPI or SLURM without a launcher), and removes what it overrules. `recorded` selects what config.json records.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import cast, get_args

from isicdist.config import Precision
from shards.errors import UsageError

HINT = "start with: accelerate launch --config_file launch/cpu2.yaml (or gpu8.yaml) ..."
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Set by torchrun and by `accelerate launch` of several processes."""
MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
MPI_RANKS = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
MPI_LOCALS = (
    "MPI_LOCALRANKID",
    "MPI_LOCALNRANKS",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "MV2_COMM_WORLD_LOCAL_SIZE",
)
INTEGERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", *MPI_SIZES, *MPI_RANKS)

UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor and context parallelism",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker's data parallelism",
}
"""Switches of accelerate for what this toolkit does not do: the network is small, and every process has all of it."""
SPELLINGS = {
    "float16": "fp16",
    "half": "fp16",
    "16": "fp16",
    "bfloat16": "bf16",
    "float32": "no",
    "fp32": "no",
    "32": "no",
    "none": "no",
    "false": "no",
}
"""Other names of a precision, for the message."""
RECORDED = (
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "ACCELERATE_USE_CPU",
    "ACCELERATE_MIXED_PRECISION",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "CUBLAS_WORKSPACE_CONFIG",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
    "NCCL_P2P_DISABLE",
    "NCCL_IB_DISABLE",
)
"""Variables that may change the numbers or the speed of a run. A list of names: no secret gets into a record."""


@dataclass(frozen=True, kw_only=True)
class LaunchEnvironment:
    """The part of the environment that decides how this process takes part in a run."""

    world_size: int
    """Processes that the launcher started."""
    local_world_size: int
    """Those of them on this machine."""
    use_cpu: bool
    """ACCELERATE_USE_CPU: train on the CPU though there may be a GPU."""
    mixed_precision: Precision
    """As the launcher was asked; no without a launcher."""


def read_environment(environ: MutableMapping[str, str]) -> LaunchEnvironment:
    """Check the environment of this process, and remove from it what is overruled (empty values, ranks of MPI).

    Raises UsageError that names the variable.
    """
    for name in (*INTEGERS, *LAUNCHER_VARIABLES, "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU"):
        if not environ.get(name, "unset").strip():
            del environ[name]  # an empty value is not a number to accelerate
    numbers = {name: _integer(name, environ[name]) for name in INTEGERS if name in environ}
    for name, what in UNSUPPORTED.items():
        if _flag(environ, name):
            raise UsageError(f"{name} is {environ[name]}: isicdist does not use {what}; unset {name}")
    if environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") not in ("", "1", "auto"):
        raise UsageError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS is {environ['ACCELERATE_GRADIENT_ACCUMULATION_STEPS']}: gradient "
            "accumulation is derived from --batch.global-size and --batch.micro-size; unset it"
        )
    if environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() not in ("", "no"):
        raise UsageError(
            f"ACCELERATE_DYNAMO_BACKEND is {environ['ACCELERATE_DYNAMO_BACKEND']}: unset it (accelerate launch "
            "--dynamo_backend no); isicdist compiles the network with --compile on"
        )
    if "ACCELERATE_TORCH_DEVICE" in environ:
        raise UsageError(
            f"ACCELERATE_TORCH_DEVICE is {environ['ACCELERATE_TORCH_DEVICE']}: each process takes the GPU of its local "
            "rank; unset it, and choose GPUs with CUDA_VISIBLE_DEVICES"
        )
    _check_ranks(environ, numbers)
    return LaunchEnvironment(
        world_size=numbers.get("WORLD_SIZE", 1),
        local_world_size=numbers.get("LOCAL_WORLD_SIZE", 1),
        use_cpu=_flag(environ, "ACCELERATE_USE_CPU"),
        mixed_precision=_precision(environ.get("ACCELERATE_MIXED_PRECISION", "no")),
    )


def check_launch(environ: Mapping[str, str]) -> None:
    """Raise UsageError for an environment in which accelerate would train alone, or wait for nobody.

    A real launch of several processes sets all of LAUNCHER_VARIABLES; a `WORLD_SIZE` left over in a shell has none of
    the others. `accelerate launch --cpu --num_processes 2` starts one process with `MASTER_ADDR` and no `WORLD_SIZE`.
    """
    launched = environ.get("WORLD_SIZE")
    if launched is None and "MASTER_ADDR" in environ:
        raise UsageError(f"the launcher started one process for several (--cpu does that, in silence); {HINT}")
    if launched not in (None, "1") and not {"RANK", "LOCAL_RANK", "MASTER_ADDR"} <= environ.keys():
        raise UsageError(world_size_mismatch(launched, 1))


def world_size_mismatch(launched: int | str | None, set_up: int) -> str:
    """Word the error for a launch whose processes would each train alone."""
    return (
        f"WORLD_SIZE is {launched}, but accelerate has set up {set_up} process(es), so each would train alone; "
        f"{HINT}, or unset WORLD_SIZE"
    )


def recorded(environ: Mapping[str, str]) -> dict[str, str]:
    """Give the variables of RECORDED that are set, for config.json."""
    return {name: environ[name] for name in RECORDED if name in environ}


def notable(environ: Mapping[str, str]) -> dict[str, str]:
    """Give every variable that is set and that this module knows, for `isicdist doctor`."""
    names = (*LAUNCHER_VARIABLES, *MPI_SIZES, *UNSUPPORTED, *RECORDED, "SLURM_STEP_NUM_TASKS")
    names += ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_TORCH_DEVICE")
    return {name: environ[name] for name in dict.fromkeys(names) if name in environ}


def _check_ranks(environ: MutableMapping[str, str], numbers: dict[str, int]) -> None:
    check_launch(environ)
    launched = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= environ.keys()
    if not launched and "LOCAL_RANK" in environ:
        raise UsageError(f"LOCAL_RANK is {environ['LOCAL_RANK']}, but no launcher has set WORLD_SIZE; unset LOCAL_RANK")
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if numbers.get(size, 1) < 1 or not 0 <= numbers.get(rank, 0) < numbers.get(size, numbers.get(rank, 0) + 1):
            raise UsageError(
                f"{rank} is {environ.get(rank, 'not set')} and {size} is {environ.get(size, 'not set')}: a rank lies "
                f"from 0 to below the size; {HINT}"
            )
    if launched:
        for name in (*MPI_SIZES, *MPI_RANKS, *MPI_LOCALS):  # accelerate would take them for the launcher's
            environ.pop(name, None)
        return
    for name in (*MPI_SIZES, "SLURM_STEP_NUM_TASKS"):
        if _integer(name, environ.get(name, "1")) > 1:
            raise UsageError(
                f"{name} is {environ[name]}, but no launcher has set WORLD_SIZE, so each process would train alone; "
                f"{HINT} on each machine (see launch/slurm.sbatch)"
            )


def _precision(value: str) -> Precision:
    value = value.strip().lower()
    if value in get_args(Precision):
        return cast(Precision, value)
    if value == "fp8":
        raise UsageError("ACCELERATE_MIXED_PRECISION is fp8, which isicdist does not use; give bf16, fp16 or no")
    near = f"did you mean {SPELLINGS[value]}?" if value in SPELLINGS else "give bf16, fp16 or no"
    raise UsageError(f"ACCELERATE_MIXED_PRECISION is {value}, which is no name of a precision here; {near}")


def _flag(environ: Mapping[str, str], name: str) -> bool:
    value = environ.get(name, "").strip().lower()
    if value in ("1", "true", "yes", "on", "y", "t"):
        return True
    if value in ("", "0", "false", "no", "off", "n", "f"):
        return False
    raise UsageError(f"{name} is {environ[name]}: give true or false, or unset it")


def _integer(name: str, value: str) -> int:
    try:
        return int(value)
    except ValueError as error:
        raise UsageError(f"{name} is {value!r}, which is no whole number; unset it, or {HINT}") from error
