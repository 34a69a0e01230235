"""The planned order as the first stage of a webdataset pipeline, or of any loader over an iterable dataset."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from isicdist.data.order import MASKED, BatchPlan, epoch_order, num_steps, rank_slice
from shards.format import MEMBERS
from shards.reader import Split


class PlannedSource(IterableDataset[dict[str, Any]]):
    """The samples of one rank in the order of the plan, undecoded: the first stage of a webdataset pipeline.

        wds.DataPipeline(PlannedSource(split, plan, rank), wds.map(decode), wds.batched(plan.micro_size))

    Each is a dict as webdataset's own reader makes it: `__key__`, `__url__` and the bytes of its members (`jpg`,
    `json`, `mask.png`, ...). Places without a sample are left out. Workers of a DataLoader take turns by micro batch,
    so that `batched(plan.micro_size)` in them keeps the order where the micro batches are full.
    """

    def __init__(
        self, split: Split, plan: BatchPlan, rank: int, *, seed: int = 0, window: int | None = None, epoch: int = 0
    ) -> None:
        """`epoch`: which one to give; set the attribute of the same name before the next one."""
        self.split, self.plan, self.rank = split, plan, rank
        self.seed, self.window, self.epoch = seed, window, epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The samples of the epoch. Raises CorruptShardError as `Split.read`."""
        order = epoch_order(self.split, self.seed, self.epoch, self.window)
        steps = range(num_steps(len(order), self.plan.global_size))
        batches = ((step, numbers) for step in steps for numbers in rank_slice(order, step, self.plan, self.rank))
        worker = get_worker_info()
        first, every = (worker.id, worker.num_workers) if worker else (0, 1)
        reached = self.split.start_pass(order)
        try:
            for step, numbers in itertools.islice(batches, first, None, every):
                reached(step * self.plan.global_size)
                for number in numbers[numbers != MASKED].tolist():
                    yield self._sample(number)
        finally:
            reached(len(order))

    def _sample(self, number: int) -> dict[str, Any]:
        shard = self.split.shards[self.split.table["shard"][number]]
        members = {name: bytes(self.split.read(number, member)) for member, name in enumerate(MEMBERS)}
        present = {name: data for name, data in members.items() if data}
        return {"__key__": self.split.key(number), "__url__": f"{self.split.root}/{shard}", **present}
