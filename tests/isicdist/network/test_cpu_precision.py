"""The precision of a CPU is measured once, and read afterwards."""

from __future__ import annotations

import pytest

from isicdist.network import cpu_precision
from isicdist.network.cpu_precision import faster_cpu_precision, probe_cpu_precision


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Seconds of a step by precision, in a machine with bf16 instructions and an empty cache."""
    seconds = {True: 1.0, False: 2.0}
    monkeypatch.setenv("ISICDIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu_precision, "_has_bf16_instructions", lambda: True)
    monkeypatch.setattr(cpu_precision, "_step_seconds", lambda *, bf16: seconds[bf16])
    return seconds


def test_the_faster_precision_is_chosen_and_cached(measured, tmp_path):
    assert faster_cpu_precision() == "bf16"
    measured[True] = 9.0
    assert probe_cpu_precision().gain == 2.0  # not measured again
    (tmp_path / "cache" / "cpu-precision.json").write_text("torn")
    assert faster_cpu_precision() == "no"


@pytest.mark.parametrize("gain", [0.8, 1.0, 1.05])
def test_a_small_gain_is_not_worth_the_precision(measured, gain):
    measured[False] = gain
    assert faster_cpu_precision() == "no"


def test_a_cpu_without_the_instructions_is_not_measured(measured, monkeypatch, tmp_path):
    monkeypatch.setattr(cpu_precision, "_has_bf16_instructions", lambda: False)
    monkeypatch.setattr(cpu_precision, "_step_seconds", lambda *, bf16: pytest.fail("measured"))
    assert faster_cpu_precision() == "no"
    assert not (tmp_path / "cache").exists()


def test_what_is_measured_is_a_training_step(monkeypatch):
    assert all(0 < cpu_precision._step_seconds(bf16=bf16) < 30 for bf16 in (False, True))


def test_a_cache_that_cannot_be_written_changes_nothing(measured, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file is in the way")
    assert faster_cpu_precision() == "bf16"
