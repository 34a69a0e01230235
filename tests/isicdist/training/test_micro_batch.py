"""Micro batches as large as fit."""

from __future__ import annotations

import re
import sys

import pytest
import torch

from isicdist.config import BatchConfig
from isicdist.data.order import BatchPlan
from isicdist.errors import TrainingError
from isicdist.training.micro_batch import (
    CPU_PIXELS,
    OomGuard,
    evaluation_micro_size,
    initial_micro_size,
    is_out_of_memory,
    plan_batches,
)

PLAN = BatchPlan(global_size=32, micro_size=8, world_size=2)


@pytest.mark.parametrize(
    ("share", "side", "device", "size"),
    [(16, 128, "cpu", 16), (256, 128, "cpu", 64), (16, 512, "cpu", 4), (16, 4096, "cpu", 1), (256, 512, "cuda", 256)],
)
def test_auto_begins_with_the_whole_share_or_what_a_cpu_can_take(share, side, device, size):
    assert initial_micro_size(share, side, torch.device(device)) == size
    assert device == "cuda" or size == 1 or size * side**2 <= CPU_PIXELS


@pytest.mark.parametrize(
    ("asked", "side", "device", "size"),
    [
        ("auto", 128, "cpu", 16),
        ("auto", 512, "cpu", 4),
        (1, 64, "cpu", 1),
        ("auto", 512, "cuda", 16),
        (64, 8192, "cuda", 1),
    ],
)
def test_an_evaluation_takes_no_more_than_training_or_than_fits(asked, side, device, size):
    assert evaluation_micro_size(asked, side, torch.device(device)) == size


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input.",
        "GET was unable to find an engine to execute this computation",
        "FIND was unable to find an engine to execute this computation after trying 8 plans.",
    ],
)
def test_every_spelling_of_out_of_memory_is_recognised(text):
    memory = OomGuard()
    with memory:
        raise RuntimeError(text)
    assert memory.tripped
    with pytest.raises(ValueError, match=re.escape(text)), OomGuard():
        raise ValueError(text)  # of something else


def test_out_of_memory_is_noticed_and_other_errors_pass():
    memory = OomGuard()
    with memory:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert memory.tripped
    memory = OomGuard()
    with pytest.raises(RuntimeError, match="shapes"), memory:
        raise RuntimeError("shapes do not fit")
    with pytest.raises(KeyboardInterrupt), memory:
        raise KeyboardInterrupt
    assert not memory.tripped


def test_an_allocation_that_really_fails_is_noticed():
    memory = OomGuard()
    with memory:
        torch.empty(2**60, dtype=torch.uint8)
    assert memory.tripped


def test_half_the_size_is_twice_the_accumulation():
    memory = OomGuard()
    memory.tripped = True
    plan = memory.halve_micro_batch(PLAN, "auto")
    assert not memory.tripped
    assert (plan.micro_size, plan.accumulation_steps, plan.global_size) == (4, 2 * PLAN.accumulation_steps, 32)


def test_what_cannot_be_cut_is_said_in_one_line():
    with pytest.raises(TrainingError, match=r"out of memory with 8 samples at once.*micro-size auto"):
        OomGuard().halve_micro_batch(PLAN, 8)
    with pytest.raises(TrainingError, match="out of memory with 1 sample at once"):
        OomGuard().halve_micro_batch(BatchPlan(global_size=2, micro_size=1, world_size=2), "auto")
    memory = OomGuard()
    with memory:
        raise RuntimeError("GET was unable to find an engine to execute this computation\nmore")
    with pytest.raises(TrainingError, match=r"1 sample at once \(GET was unable .* computation\): train on smaller"):
        memory.halve_micro_batch(BatchPlan(global_size=1, micro_size=1, world_size=1), "auto")


FAULTS = """
import resource, torch
from isicdist.distributed.launch import disable_malloc_trim
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        [torch.ones(2**22) for _ in range(4)]  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
given_back = faults()
disable_malloc_trim()
faults()
print(given_back, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_what_a_step_frees_is_there_for_the_next_one(python):
    given_back, kept = map(int, python("-c", FAULTS, anew=True).stdout.split())
    assert kept < given_back / 10


@pytest.mark.parametrize(("asked", "world", "micro", "accumulation"), [(16, 4, 2, 1), (3, 2, 3, 2), ("auto", 3, 3, 1)])
def test_a_global_batch_is_cut_into_micro_batches_no_larger_than_a_share(asked, world, micro, accumulation):
    plan = plan_batches(BatchConfig(global_size=8, micro_size=asked), world, 64, torch.device("cpu"))
    assert (plan.global_size, plan.world_size) == (8, world)
    assert (plan.micro_size, plan.accumulation_steps) == (micro, accumulation)


def test_a_large_micro_batch_does_not_make_an_evaluation_large():
    assert evaluation_micro_size(64, 64, torch.device("cpu")) == 16


@pytest.mark.parametrize(
    ("error", "noticed"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (OSError("out of memory"), False),
    ],
)
def test_the_errors_of_each_allocator_are_recognised(error, noticed):
    assert is_out_of_memory(error) is noticed
