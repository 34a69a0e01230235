"""Environment variables: accepted, overruled, or refused in one line that names them."""

from __future__ import annotations

import pytest

from isicdist.distributed.environment import MPI_SIZES, check_launch, notable, read_environment, recorded
from shards.errors import UsageError

LAUNCHED = {
    "WORLD_SIZE": "2",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def test_a_real_launch_and_a_plain_start_are_accepted():
    launched = read_environment({**LAUNCHED, "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_CPU": "true"})
    assert (launched.world_size, launched.local_world_size) == (2, 2)
    assert (launched.mixed_precision, launched.use_cpu) == ("bf16", True)
    plain = read_environment({})
    assert (plain.world_size, plain.mixed_precision, plain.use_cpu) == (1, "no", False)
    check_launch({"WORLD_SIZE": "1"})


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "MASTER_ADDR"])
def test_a_world_size_left_over_in_a_shell_is_refused(missing):
    with pytest.raises(UsageError, match="WORLD_SIZE is 2"):
        read_environment({name: value for name, value in LAUNCHED.items() if name != missing})


def test_one_process_started_for_two_is_refused():
    with pytest.raises(UsageError, match="started one process for several"):
        read_environment({"MASTER_ADDR": "127.0.0.1"})


def test_what_a_launcher_of_one_process_sets_is_accepted():
    environ = {
        "ACCELERATE_DYNAMO_BACKEND": "NO",
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_USE_DEEPSPEED": "false",
    }
    assert read_environment(environ).mixed_precision == "no"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "accumulation is derived from --batch.global-size"),
        ("ACCELERATE_MIXED_PRECISION", "float16", "did you mean fp16"),
        ("ACCELERATE_MIXED_PRECISION", "BFloat16", "did you mean bf16"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "give bf16, fp16 or no"),
        ("ACCELERATE_MIXED_PRECISION", "yes", "give bf16, fp16 or no"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "does not use DeepSpeed; unset"),
        ("ACCELERATE_USE_FSDP", "1", "does not use FSDP; unset"),
        ("ACCELERATE_USE_MEGATRON_LM", "yes", "does not use Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "True", "does not use tensor"),
        ("ACCELERATE_USE_FSDP", "perhaps", "give true or false"),
        ("ACCELERATE_USE_CPU", "maybe", "give true or false"),
        ("ACCELERATE_DYNAMO_BACKEND", "inductor", "--compile on"),
        ("ACCELERATE_TORCH_DEVICE", "cuda:1", "CUDA_VISIBLE_DEVICES"),
        ("WORLD_SIZE", "two", "no whole number"),
        ("LOCAL_RANK", "0", "unset LOCAL_RANK"),
        ("OMP_NUM_THREADS", "all", "no whole number"),
        *((name, "2", "each process would train alone") for name in MPI_SIZES),
        ("SLURM_STEP_NUM_TASKS", "8", "each process would train alone"),
    ],
)
def test_what_would_change_the_run_is_refused_by_name(name, value, message):
    with pytest.raises(UsageError, match=message) as caught:
        read_environment({name: value})
    assert str(caught.value).startswith(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"RANK": "2"}, {"RANK": "-1"}, {"LOCAL_RANK": "5"}, {"WORLD_SIZE": "0"}])
def test_a_rank_outside_of_its_world_is_refused(change):
    with pytest.raises(UsageError, match="a rank lies from 0 to below the size"):
        read_environment({**LAUNCHED, **change})


def test_ranks_of_mpi_below_a_launcher_are_overruled():
    environ = {**LAUNCHED, "PMI_SIZE": "3", "OMPI_COMM_WORLD_RANK": "2", "MPI_LOCALRANKID": "1"}
    assert read_environment(environ).world_size == 2
    assert environ == LAUNCHED


def test_an_empty_value_is_none():
    environ = {
        "WORLD_SIZE": "",
        "RANK": " ",
        "PMI_SIZE": "",
        "ACCELERATE_MIXED_PRECISION": "",
        "ACCELERATE_USE_CPU": "",
    }
    assert read_environment(environ).world_size == 1
    assert environ == {}


def test_a_record_has_what_changes_numbers_and_no_secret():
    environ = {"OMP_NUM_THREADS": "2", "WANDB_API_KEY": "secret", "NVIDIA_TF32_OVERRIDE": "0", "RANK": "0"}
    assert recorded(environ) == {"OMP_NUM_THREADS": "2", "NVIDIA_TF32_OVERRIDE": "0"}
    assert "WANDB_API_KEY" not in notable(environ)
