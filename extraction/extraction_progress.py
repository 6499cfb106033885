"""Progress of an extraction: samples, bytes and rates per teacher."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from rich.console import Console

from kvcore.monitoring.progress import Meter
from kvcore.monitoring.units import in_bytes


@dataclass(slots=True)
class _Count:
    samples: int
    done: int = 0
    nbytes: int = 0


class ExtractionProgress:
    """Shows progress per teacher. The remaining time is estimated from tokens, since long samples come first.

    Args:
        work: samples and student tokens to fetch, by teacher.
        console: where progress bars are drawn; if it is not a terminal, progress is logged.
    """

    def __init__(self, work: Mapping[str, tuple[int, int]], console: Console | None = None) -> None:
        self._counts = {name: _Count(samples) for name, (samples, _) in work.items()}
        self._meter = Meter({name: tokens for name, (_, tokens) in work.items()}, console)
        self._lock = threading.Lock()
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        self._meter.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._meter.__exit__()

    def advance(self, teacher: str, *, samples: int, tokens: int, nbytes: int) -> None:
        """Adds one request; `nbytes` of K/V."""
        with self._lock:
            count = self._counts[teacher]
            count.done += samples
            count.nbytes += nbytes
            seconds = max(time.monotonic() - self._started, 1e-6)
            rate = f"{count.done / seconds:.1f} samples/s, {in_bytes(count.nbytes / seconds)}/s"
            text = f"{count.done}/{count.samples} samples, {in_bytes(count.nbytes)}, {rate}"
            self._meter.advance(teacher, tokens, text)
