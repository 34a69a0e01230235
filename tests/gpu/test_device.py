"""The GPU computes what the CPU computes: the checks of benchmarks/gpu, one test each."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.checks import CHECKS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("name", [name for name in CHECKS if not name.endswith(("bf16", "fp16"))])
def test_gpu_computes_what_the_cpu_does(name, shard_set):
    assert CHECKS[name](shard_set)
