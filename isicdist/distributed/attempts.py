"""Rendezvous after a restart by the launcher (`--max_restarts`), by keys of its own.

torchrun's store outlives its attempts, so that a rank of the second attempt may find the addresses that the ranks of
the first left there, and wait for a process that has gone (https://github.com/pytorch/pytorch/issues/135712).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import timedelta
from urllib.parse import urlsplit

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

SCHEME = "isicdist-attempt"


def init_method(env: Mapping[str, str]) -> str | None:
    """Choose the `init_method` of the process group: after a restart on one machine, else None for the default.

    Several machines count their restarts each for itself: a prefix by that number might keep them apart.
    """
    attempt = int(env.get("TORCHELASTIC_RESTART_COUNT", "0"))
    on_one_machine = env.get("LOCAL_WORLD_SIZE") == env.get("WORLD_SIZE")
    return f"{SCHEME}://{attempt}" if attempt and on_one_machine else None


def _rendezvous(url: str, timeout: timedelta) -> Iterator[tuple[Store, int, int]]:
    for store, rank, world_size in rendezvous("env://", timeout=timeout):
        yield PrefixStore(urlsplit(url).netloc, store), rank, world_size


register_rendezvous_handler(SCHEME, _rendezvous)
