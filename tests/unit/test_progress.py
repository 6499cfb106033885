"""Tests of the progress of long tasks: bars on a terminal, log lines elsewhere, with the time left."""

from __future__ import annotations

import io
import logging
import sys

import pytest
from rich.console import Console

from kvcore.monitoring import progress
from kvcore.monitoring.progress import Meter, logs_above
from kvcore.monitoring.units import in_bytes, in_time


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def plain() -> Console:
    return Console(file=io.StringIO())


def test_without_a_terminal_lines_are_logged_periodically_and_at_the_end(clock: Clock, plain: Console) -> None:
    logged: list[str] = []
    with Meter({"ada": 3, "ben": 1}, plain, every=10, log=logged.append) as meter:
        meter.advance("ada")
        assert logged == []
        clock.now += 11
        meter.advance("ada")
        meter.advance("ben", text="one of one")
        meter.advance("ada")
    assert logged == ["ada: 2/3, 0:00:06 left", "ben: one of one, 0:00:00 left", "ada: 3/3, 0:00:00 left"]


def test_time_left_is_estimated_from_the_pace_so_far(clock: Clock, plain: Console) -> None:
    logged: list[str] = []
    with Meter({"tokens": 9000}, plain, every=0, log=logged.append) as meter:
        meter.advance("tokens", 0, "reading")
        clock.now += 10
        meter.advance("tokens", 3000)
    assert logged == ["tokens: reading, ? left", "tokens: 3,000/9,000, 0:00:20 left"]


def test_lines_are_logged_by_default(plain: Console, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Meter({"made-up": 1}, plain) as meter:
        meter.advance("made-up")
    assert caplog.messages == ["made-up: 1/1, 0:00:00 left"]


def test_brief_task_logs_nothing_if_it_ends_before_the_first_interval(
    plain: Console, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with Meter({"made-up": 1}, plain, brief=True) as meter:
        meter.advance("made-up")
    assert caplog.messages == []


def test_terminal_shows_one_bar_per_part() -> None:
    screen = io.StringIO()
    logged: list[str] = []
    with Meter({"ada": 2, "ben": 0}, Console(file=screen, force_terminal=True, width=160), log=logged.append) as meter:
        meter.advance("ada", text="[bold]1 of 2")
    assert "ada" in screen.getvalue()
    assert "ben" in screen.getvalue()
    assert "[bold]1 of 2" in screen.getvalue()
    assert logged == []


def test_log_lines_are_redirected_through_richs_stderr_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, proxy, other = io.StringIO(), io.StringIO(), io.StringIO()
    handlers = [logging.StreamHandler(terminal), logging.StreamHandler(other)]
    monkeypatch.setattr(logging.getLogger(), "handlers", handlers)
    monkeypatch.setattr(sys, "__stderr__", terminal)
    monkeypatch.setattr(sys, "stderr", proxy)
    with logs_above():
        logging.getLogger("any").warning("above the bar")
    logging.getLogger("any").warning("as before")
    assert proxy.getvalue() == "above the bar\n"
    assert terminal.getvalue() == "as before\n"
    assert other.getvalue() == "above the bar\nas before\n"


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, "0.0 kB"), (1500, "1.5 kB"), (999_999, "1000.0 kB"), (12_300_000, "12.3 MB"), (4 * 10**12, "4.0 TB")],
)
def test_bytes_are_formatted_in_powers_of_ten(count: int, expected: str) -> None:
    assert in_bytes(count) == expected


def test_times_are_formatted_as_hours_minutes_seconds() -> None:
    assert [in_time(seconds) for seconds in (0.4, 61, 36000)] == ["0:00:00", "0:01:01", "10:00:00"]
