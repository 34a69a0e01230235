"""`isicdist` in the floating-point type of the first argument: for test_train.py."""

from __future__ import annotations

import sys

import torch

from isicdist.cli import main

if __name__ == "__main__":
    torch.set_default_dtype(getattr(torch, sys.argv[1]))
    main(sys.argv[2:])
