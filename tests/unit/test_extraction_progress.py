"""Progress: a bar in a terminal, plain lines elsewhere; both say how much, how fast, and how long."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from extraction import progress
from extraction.progress import ExtractionProgress, in_bytes, in_time


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_line_has_samples_bytes_rates_and_the_time_left_by_tokens(clock: Clock) -> None:
    with ExtractionProgress({"ada": (40, 9000)}, Console(file=io.StringIO())) as shown:
        assert shown.line("ada").endswith("? left")
        clock.now += 10
        shown.advance("ada", samples=10, tokens=3000, written=50_000_000)
        assert shown.line("ada") == "10/40 samples, 50.0 MB, 1.0 samples/s, 5.0 MB/s, 0:00:20 left"


def test_without_a_terminal_lines_come_now_and_then_and_at_the_end(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with ExtractionProgress({"ada": (3, 30), "ben": (1, 9)}, Console(file=io.StringIO())) as shown:
        shown.advance("ada", samples=1, tokens=10, written=1)
        assert caplog.messages == []
        clock.now += progress.PLAIN_SECONDS + 1
        shown.advance("ada", samples=1, tokens=10, written=1)
        shown.advance("ben", samples=1, tokens=9, written=1)
        shown.advance("ada", samples=1, tokens=10, written=1)
    assert [message.split(" samples")[0] for message in caplog.messages] == ["ada: 2/3", "ben: 1/1", "ada: 3/3"]


def test_a_terminal_gets_a_bar_for_each_teacher() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    with ExtractionProgress({"ada": (2, 20), "ben": (0, 0)}, console) as shown:
        shown.advance("ada", samples=1, tokens=10, written=2000)
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "ada" in text
    assert "ben" in text
    assert "1/2 samples, 2.0 kB" in text


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0.0 kB"), (1500, "1.5 kB"), (999_999, "1000.0 kB"), (12_300_000, "12.3 MB"), (4 * 10**12, "4.0 TB")],
)
def test_bytes_are_said_in_powers_of_ten(count: int, said: str) -> None:
    assert in_bytes(count) == said


def test_times_are_hours_minutes_seconds() -> None:
    assert [in_time(seconds) for seconds in (0.4, 61, 36000)] == ["0:00:00", "0:01:01", "10:00:00"]
