"""Upload of small host arrays, such as the parameters of an augmentation, without waiting for the device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def upload(values: np.ndarray, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Copy an array to the device, as `dtype` where one is given.

    A copy from pageable memory may wait for the device, so on a GPU it goes through pinned memory, which torch's
    allocator caches and holds until the copy is done.
    """
    tensor = torch.from_numpy(values)
    if dtype is not None:
        tensor = tensor.to(dtype)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
