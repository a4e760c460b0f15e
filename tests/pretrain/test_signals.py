"""Signals that ask a run to stop."""

import signal

import pytest

from shardopt.pretrain.signals import stop_signals


def test_second_ctrl_c_interrupts_unless_it_comes_at_once_and_handlers_come_back(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stop_signals() as stop:
        assert stop.asked is None
        signal.raise_signal(signal.SIGINT)
        now[0] += 1.5  # torchrun passes on what the terminal has sent already
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked == "SIGINT"
        now[0] += 1.0
        signal.raise_signal(signal.SIGTERM)  # a scheduler that repeats itself
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
