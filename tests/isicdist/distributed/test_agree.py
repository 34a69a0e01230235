"""A stop signal: received once although it comes twice, and handled by its former owner afterwards."""

from __future__ import annotations

import re
import signal
import sys
import time
from pathlib import Path

import pytest

from isicdist.distributed.agree import StopSignal
from isicdist.distributed.launch import LAUNCHER_GONE


@pytest.mark.parametrize("count", [0, 1, 3])
def test_signals_in_a_row_are_one_and_the_former_handlers_come_back(count):
    before = [signal.getsignal(number) for number in StopSignal.SIGNALS]
    with StopSignal() as stop:
        for number in StopSignal.SIGNALS[:count]:
            signal.raise_signal(number)  # the default would end the test
        assert stop.received is (count > 0)
    assert [signal.getsignal(number) for number in StopSignal.SIGNALS] == before
    assert not stop._thread.is_alive()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, LAUNCHER_GONE])
def test_each_signal_asks_to_stop(number):
    with StopSignal() as stop:
        signal.raise_signal(number)
        assert stop.received


def caught(number: int) -> bool:
    """True while the kernel calls a handler for the signal, which Python itself does not know."""
    status = Path("/proc/self/status").read_text()
    return bool(int(re.findall(r"SigCgt:\s+(\w+)", status)[0], 16) >> (number - 1) & 1)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_second_signal_ends_the_process_but_not_at_once_nor_after_the_death_of_the_launcher(monkeypatch):
    monkeypatch.setattr(StopSignal, "REPEAT_SECONDS", 0.3)
    with StopSignal():
        signal.raise_signal(LAUNCHER_GONE)
        time.sleep(0.5)
        assert caught(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.05)
        assert caught(signal.SIGTERM)
        until = time.monotonic() + 20
        while caught(signal.SIGTERM):
            assert time.monotonic() < until
            time.sleep(0.01)
