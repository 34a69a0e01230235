"""Events to log, and wandb without a login."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from isicdist.training.tracking import EvaluationMetrics, TrainMetrics


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
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    yield
    wandb.teardown()
