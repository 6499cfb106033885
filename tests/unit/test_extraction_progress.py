"""Tests of the extraction's progress display: amounts, rates and remaining time."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from extraction.extraction_progress import ExtractionProgress
from kvcore.monitoring import progress


def test_log_line_has_samples_bytes_rates_and_remaining_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    caplog.set_level(logging.INFO)
    with ExtractionProgress({"ada": (40, 9000)}, Console(file=io.StringIO())) as shown:
        now += 20
        shown.advance("ada", samples=10, tokens=3000, nbytes=50_000_000)
        shown.advance("ada", samples=30, tokens=6000, nbytes=50_000_000)
    assert caplog.messages == [
        "ada: 10/40 samples, 50.0 MB, 0.5 samples/s, 2.5 MB/s, 0:00:40 left",
        "ada: 40/40 samples, 100.0 MB, 2.0 samples/s, 5.0 MB/s, 0:00:00 left",
    ]


def test_terminal_shows_a_progress_bar_per_teacher() -> None:
    screen = io.StringIO()
    with ExtractionProgress(
        {"ada": (2, 20), "ben": (0, 0)}, Console(file=screen, force_terminal=True, width=160)
    ) as shown:
        shown.advance("ada", samples=1, tokens=10, nbytes=2000)
    assert "ben" in screen.getvalue()
    assert "1/2 samples, 2.0 kB" in screen.getvalue()
