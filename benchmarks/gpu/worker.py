"""`isicdist` under conditions that its command line does not offer: python -m benchmarks.gpu.worker [OPTIONS] train ...

Start it directly, or under `accelerate launch -m` or `torch.distributed.run -m`.
"""

from __future__ import annotations

import argparse
import functools
import os

import torch
from accelerate.utils import InitProcessGroupKwargs

import isicdist.train
from isicdist.cli import main
from isicdist.distributed import launch
from isicdist.distributed.gradients import Gradients


class AlwaysReduced(Gradients):
    """Gradients with an all-reduce on a single rank, too."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self._distributed = torch.distributed.is_initialized()


def share_one_gpu() -> None:
    """Let several ranks share one GPU over gloo: NCCL refuses that, and so does `launch.start`.

    gloo copies CUDA tensors through the host. accelerate puts local rank r on GPU r modulo the number of GPUs.
    """
    launch.InitProcessGroupKwargs = functools.partial(InitProcessGroupKwargs, backend="gloo")  # pyright: ignore
    launch._check_devices = lambda *args, **kwargs: None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gloo", action="store_true", help="collectives over gloo, several ranks on one GPU")
    parser.add_argument("--dtype", default="float32", help="of weights and images")
    parser.add_argument("--deterministic", action="store_true", help="deterministic cuDNN algorithms, no TF32")
    parser.add_argument("--memory-fraction", type=float, help="of the GPU's memory that torch may allocate")
    parser.add_argument("--all-reduce", action="store_true", help="sum gradients on one rank, too")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="arguments of isicdist")
    options = parser.parse_args()
    if options.gloo and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        share_one_gpu()
    torch.set_default_dtype(getattr(torch, options.dtype))
    if options.deterministic:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    if options.memory_fraction:
        torch.cuda.set_per_process_memory_fraction(options.memory_fraction)
    if options.all_reduce:
        isicdist.train.Gradients = AlwaysReduced
    main(options.command)
