"""How far an extraction is, in samples, bytes and rates of each teacher."""

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
    written: int = 0


class ExtractionProgress:
    """A meter of every teacher. The remaining time counts tokens: long samples come first.

    Args:
        work: samples and tokens that each teacher has to do; tokens are the student's.
        console: where bars are drawn; where it is no terminal, lines go to the log instead.
    """

    def __init__(self, work: Mapping[str, tuple[int, int]], console: Console | None = None) -> None:
        self._counts = {name: _Count(samples) for name, (samples, _) in work.items()}
        self._meter = Meter({name: tokens for name, (_, tokens) in work.items()}, console)
        self._lock = threading.Lock()
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        self._meter.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._meter.__exit__()

    def advance(self, teacher: str, *, samples: int, tokens: int, written: int) -> None:
        """Counts what one request brought, in bytes of K/V."""
        with self._lock:
            count = self._counts[teacher]
            count.done += samples
            count.written += written
            seconds = max(time.monotonic() - self._began, 1e-6)
            rate = f"{count.done / seconds:.1f} samples/s, {in_bytes(count.written / seconds)}/s"
            said = f"{count.done}/{count.samples} samples, {in_bytes(count.written)}, {rate}"
            self._meter.advance(teacher, tokens, said)
