"""Names of the ranks that a failed collective has lost, by way of the store of the process group.

Every rank that notices the failure reports so to the store, which the launcher of the first machine runs; the ranks
that have not reported after a few seconds are those that are gone, cut off or stopped.
"""

from __future__ import annotations

import os
import platform
import time
from datetime import timedelta

import torch
from torch.distributed import distributed_c10d

_REPORT_SECONDS = 3.0
_ANSWER_SECONDS = 0.2  # after that time


def publish_host() -> None:
    """Write the host name of this rank to the store; every rank does, as soon as there is a process group."""
    if torch.distributed.is_initialized():
        _store().set(f"isicdist/host/{torch.distributed.get_rank()}", platform.node())


def lost_ranks() -> str:
    """Name the ranks that have not noticed that a collective has failed, as "1 on node7"; "" without a process group.

    Takes some seconds. Where the store itself does not answer, its machine is named.
    """
    if not torch.distributed.is_initialized():
        return ""
    store, own = _store(), torch.distributed.get_rank()
    end = time.monotonic() + _REPORT_SECONDS
    lost: list[str] = []
    try:
        store.set(f"isicdist/noticed/{own}", "")
        store.wait([f"isicdist/noticed/{own}"], timedelta(seconds=_REPORT_SECONDS))
        for rank in range(torch.distributed.get_world_size()):
            seconds = max(_ANSWER_SECONDS, end - time.monotonic())
            try:
                store.wait([f"isicdist/noticed/{rank}"], timedelta(seconds=seconds))
            except torch.distributed.DistStoreError:
                lost.append(f"{rank} on {store.get(f'isicdist/host/{rank}').decode()}")
    except torch.distributed.DistError:
        return f"or the launcher on {os.environ.get('MASTER_ADDR')}"
    return ", ".join(lost)


def _store() -> distributed_c10d.Store:
    return distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage]  # torch has no other way to it
