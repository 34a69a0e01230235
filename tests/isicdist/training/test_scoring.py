"""Scoring of a split: out of memory is said in a line, and samples are decoded by as many threads as asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from isicdist.data.stream import Stream
from isicdist.errors import TrainingError
from isicdist.network.unet import ImprovedUNet
from isicdist.training import scoring
from isicdist.training.scoring import score, validate
from shards.reader import ShardSet


def test_an_evaluation_that_is_out_of_memory_says_so_in_a_line(shard_set: Path):
    def predict(images: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(TrainingError, match="out of memory with 16 images of val at once: evaluate in bf16"):
        score(predict, ShardSet.open(shard_set).split("val"), Accelerator(cpu=True))


def test_the_decoding_threads_are_those_of_the_config(shard_set, monkeypatch):
    requested: list[int] = []

    class RecordedStream(Stream):
        def __init__(self, *arguments: Any, workers: int, **options: Any) -> None:
            requested.append(workers)
            super().__init__(*arguments, workers=workers, **options)

    monkeypatch.setattr(scoring, "Stream", RecordedStream)
    split = ShardSet.open(shard_set).split("val")
    validate(ImprovedUNet(base_channels=2), split, Accelerator(cpu=True), micro_size=16, workers=3)
    assert requested == [3]
