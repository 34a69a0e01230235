"""Planned order as an `IterableDataset`: the first stage of a webdataset pipeline or of a DataLoader."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from isicdist.data.order import MASKED, BatchPlan, epoch_order, num_steps, rank_slice
from shards.format import MEMBERS
from shards.reader import Split


class PlannedSource(IterableDataset[dict[str, Any]]):
    """Undecoded samples of one rank, in the planned order: the first stage of a webdataset pipeline.

        wds.DataPipeline(PlannedSource(split, plan, rank), wds.map(decode), wds.batched(plan.micro_size))

    Each sample is a dict like those of webdataset's own reader: `__key__`, `__url__` and the bytes of its members
    (`jpg`, `json`, `mask.png`, ...). Masked slots are skipped. Workers of a DataLoader take turns by micro batch, so
    that `batched(plan.micro_size)` in them keeps the order where the micro batches are full.
    """

    def __init__(
        self, split: Split, plan: BatchPlan, rank: int, *, seed: int = 0, window: int | None = None, epoch: int = 0
    ) -> None:
        """Plan the samples of `rank`.

        `seed` and `epoch` decide the order; set the attribute `epoch` before each later one. `window`: shards
        shuffled together (None: all).
        """
        self.split, self.plan, self.rank = split, plan, rank
        self.seed, self.window = seed, window
        self._epoch = torch.tensor(epoch).share_memory_()  # persistent workers of a DataLoader see it change

    @property
    def epoch(self) -> int:
        """Epoch that the next iteration reads."""
        return int(self._epoch)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the samples of this rank (and DataLoader worker) in one epoch. Raises CorruptShardError."""
        order = epoch_order(self.split, self.seed, self.epoch, self.window)
        steps = range(num_steps(len(order), self.plan.global_size))
        batches = ((step, indices) for step in steps for indices in rank_slice(order, step, self.plan, self.rank))
        worker = get_worker_info()
        worker_id, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        advance = self.split.start_pass(order)
        try:
            for step, indices in itertools.islice(batches, worker_id, None, num_workers):
                advance(step * self.plan.global_size)
                for index in indices[indices != MASKED].tolist():
                    yield self._sample(index)
        finally:
            advance(len(order))

    def _sample(self, index: int) -> dict[str, Any]:
        shard = self.split.shards[int(self.split.table["shard"][index])]
        members = {name: bytes(self.split.read(index, member)) for member, name in enumerate(MEMBERS)}
        present = {name: data for name, data in members.items() if data}
        return {"__key__": self.split.key(index), "__url__": f"{self.split.root}/{shard}", **present}
