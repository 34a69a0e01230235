"""Hosts for the tests of clusters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Host, hosts, why_not


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[list[Host]]:
    """Two hosts to compute, and a third that serves files."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with hosts(tmp_path, "alpha", "beta", "files") as made:
        yield made
