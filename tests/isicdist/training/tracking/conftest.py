"""Events to log, and wandb without a login, whose offline runs are read back."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isicdist.metrics.examples import Example
from isicdist.metrics.thresholds import BINS, ThresholdCurve
from isicdist.training.tracking import EvaluationDetails, EvaluationMetrics, TrainMetrics


@pytest.fixture
def train_metrics() -> TrainMetrics:
    """One logged training step, the first."""
    return TrainMetrics(
        step=1,
        epoch=0,
        samples=32,
        loss=0.5,
        pooled_dice=0.25,
        lr=1e-3,
        grad_norm=1.5,
        images_per_s=17.0,
        data_wait=0.01,
        skipped=0,
        memory_bytes=2_000_000_000,
    )


@pytest.fixture
def scores() -> EvaluationMetrics:
    """One evaluation after the first step."""
    return EvaluationMetrics(
        step=1,
        split="val",
        n=3,
        mean_dice=0.8,
        pooled_dice=0.7,
        mean_jaccard=0.6,
        thresholded_jaccard=0.5,
    )


@pytest.fixture
def without_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """wandb as on a machine where nobody has logged in."""
    import wandb

    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_DATA_DIR", "")  # what a run sets is undone after the test
    monkeypatch.delenv("WANDB_DATA_DIR")
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    yield
    wandb.teardown()


@pytest.fixture
def details() -> EvaluationDetails:
    """Two fixed images and the worst one, all off by a column, and a curve."""
    mask = np.zeros((32, 48), bool)
    mask[8:24, 8:24] = True
    examples = [
        Example(
            group=group,
            key=f"ISIC_{number:07}",
            dice=number / 10,
            lesion_area=float(mask.mean()),
            aspect_ratio=1.5,
            image=np.full((32, 48, 3), 20 * number, np.uint8),
            mask=mask,
            prediction=np.roll(mask, 1, axis=1),
        )
        for group, number in (("fixed", 4), ("fixed", 9), ("worst", 1))
    ]
    return EvaluationDetails(
        epoch=2,
        samples=96,
        scores={"average_precision": 0.9, "calibration_error": 0.05},
        dice=np.array([0.1, 0.4, 0.9]),
        curve=ThresholdCurve(on=np.arange(BINS), off=np.arange(BINS)[::-1]),
        examples=examples,
    )


@pytest.fixture
def read_wandb() -> Callable[[Path], list[Any]]:
    """Read the records of the offline runs of a run's folder, in order.

    The file has the framing of LevelDB's log: chunks of at most 32 KiB, each behind checksum, length and type.
    """
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    def read(run: Path) -> list[Any]:
        wandb.teardown()  # its service process may still be writing after `finish`
        records: list[Any] = []
        for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
            data, position, record = path.read_bytes(), 7, b""
            while position + 7 <= len(data):
                rest = -position % 2**15
                if 0 < rest < 7:  # too little for another chunk's header: padding
                    position += rest
                    continue
                _, length, kind = struct.unpack_from("<IHB", data, position)
                record += data[position + 7 : position + 7 + length]
                position += 7 + length
                if kind in (1, 4):  # a whole record, or its last part
                    records.append(Record.FromString(record))
                    record = b""
        return records

    return read
