"""Tests of a server's load over the last minutes."""

from __future__ import annotations

import pytest

from teacher_server.monitoring.load_history import KEPT_SECONDS, Load, LoadHistory


def test_curves_have_rates_between_samples_and_counts() -> None:
    history = LoadHistory()
    assert history.curves()["tokens_per_second"] == []
    history.add(Load(100.0, 1000.0, 1, 7, time=10.0))
    history.add(Load(600.0, 3000.0, 2, 0, time=20.0))
    assert history.curves() == {
        "tokens_per_second": [(20.0, 50.0)],
        "bytes_per_second": [(20.0, 200.0)],
        "open_requests": [(20.0, 2)],
        "queued_tokens": [(20.0, 0)],
    }


def test_old_samples_are_dropped() -> None:
    history = LoadHistory()
    for minute in range(60):
        history.add(Load(0.0, 0.0, 0, 0, time=60.0 * minute))
    times = [time for time, _ in history.curves()["open_requests"]]
    assert times[-1] == 59 * 60
    assert times[0] == pytest.approx(59 * 60 - KEPT_SECONDS + 60)
