"""How far an extraction is: a bar for each teacher in a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

logger = logging.getLogger(__name__)

PLAIN_SECONDS = 15.0


@dataclass(slots=True)
class _Count:
    """What one teacher has done; tokens are the student's."""

    samples: int
    tokens: int
    done_samples: int = 0
    done_tokens: int = 0
    written: int = 0


class ExtractionProgress:
    """Shows samples, bytes, rate and remaining time of each teacher. Safe to use from several threads.

    The remaining time counts tokens: long samples come first.

    Args:
        work: samples and tokens that each teacher has to do.
        console: where bars are drawn; where it is no terminal, lines go to the log instead.
    """

    def __init__(self, work: Mapping[str, tuple[int, int]], console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._counts = {name: _Count(*amount) for name, amount in work.items()}
        self._started = self._said = time.monotonic()
        self._lock = threading.Lock()
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._started = self._said = time.monotonic()
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[line]}"))
            self._bars = Progress(*columns, console=self._console)
            for name, count in self._counts.items():
                self._tasks[name] = self._bars.add_task(name, total=max(count.tokens, 1), line=self.line(name))
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def advance(self, teacher: str, *, samples: int, tokens: int, written: int) -> None:
        """Counts what one request brought, in bytes of K/V."""
        with self._lock:
            count = self._counts[teacher]
            count.done_samples += samples
            count.done_tokens += tokens
            count.written += written
            now = time.monotonic()
            if self._bars is not None:
                self._bars.update(self._tasks[teacher], completed=count.done_tokens, line=self.line(teacher))
            elif now - self._said > PLAIN_SECONDS or count.done_samples == count.samples:
                self._said = now
                logger.info("%s: %s", teacher, self.line(teacher))

    def line(self, teacher: str) -> str:
        """How far one teacher is."""
        count, seconds = self._counts[teacher], max(time.monotonic() - self._started, 1e-6)
        rate = f"{count.done_samples / seconds:.1f} samples/s, {in_bytes(int(count.written / seconds))}/s"
        left = "?"
        if count.done_tokens:
            left = in_time(seconds / count.done_tokens * (count.tokens - count.done_tokens))
        return f"{count.done_samples}/{count.samples} samples, {in_bytes(count.written)}, {rate}, {left} left"


def in_bytes(count: int) -> str:
    """A number of bytes as people say it, in powers of ten."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1000:.1f} kB"


def in_time(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
