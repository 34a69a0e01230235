"""A stop signal: received once although it comes twice, and handled by its former owner afterwards."""

from __future__ import annotations

import signal

import pytest

from isicdist.distributed.agree import StopSignal


@pytest.mark.parametrize("count", [0, 1, 3])
def test_signals_in_a_row_are_one_and_the_former_handlers_come_back(count):
    before = [signal.getsignal(number) for number in StopSignal.SIGNALS]
    with StopSignal() as stop:
        for number in StopSignal.SIGNALS[:count]:
            signal.raise_signal(number)  # the default would end the test
        assert stop.received is (count > 0)
    assert [signal.getsignal(number) for number in StopSignal.SIGNALS] == before
    assert not stop._thread.is_alive()
