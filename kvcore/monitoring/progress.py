"""Progress of a long task: bars on a terminal, log lines elsewhere, both with the remaining time."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from kvcore.monitoring.units import in_time

logger = logging.getLogger(__name__)

PLAIN_SECONDS = 15.0


@dataclass(slots=True)
class _Part:
    total: float
    done: float = 0.0
    text: str = ""


class Meter:
    """Counts the progress of each part of a task. Thread-safe.

    Args:
        totals: amount of work by part, in a unit of about constant duration.
        console: where bars are drawn; if it is not a terminal, lines are logged instead.
        every: seconds between two lines.
        brief: whether a task that ends before its first line logs nothing; otherwise the end of a part is logged.
        log: called with each line.
    """

    def __init__(
        self,
        totals: Mapping[str, float],
        console: Console | None = None,
        every: float = PLAIN_SECONDS,
        *,
        brief: bool = False,
        log: Callable[[str], None] = logger.info,
    ) -> None:
        self._parts = {name: _Part(total) for name, total in totals.items()}
        self._every, self._log = every, log
        self._began = self._last = time.monotonic()
        self._log_ends = not brief
        self._lock = threading.Lock()
        console = console or Console(stderr=True)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[line]}", markup=False),
        )
        self._bars = Progress(*columns, TimeElapsedColumn(), console=console) if console.is_terminal else None
        self._tasks: dict[str, TaskID] = {}
        self._shown = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._began = self._last = time.monotonic()
        if self._bars is not None:
            for name, part in self._parts.items():
                self._tasks[name] = self._bars.add_task(name, total=max(part.total, 1), line=self._line(part))
            self._shown.enter_context(self._bars)
            self._shown.enter_context(logs_above())
        return self

    def __exit__(self, *_: object) -> None:
        self._shown.close()

    def advance(self, part: str, amount: float = 1, text: str = "") -> None:
        """Adds work done on a part; `text` replaces the count that is shown by default."""
        with self._lock:
            one = self._parts[part]
            one.done += amount
            one.text = text
            now = time.monotonic()
            if self._bars is not None:
                self._bars.update(self._tasks[part], completed=one.done, line=self._line(one))
            elif now - self._last >= self._every or (self._log_ends and amount and one.done >= one.total):
                self._last, self._log_ends = now, True
                self._log(f"{part}: {self._line(one)}")

    def _line(self, part: _Part) -> str:
        left = "?"
        if part.done:
            left = in_time((time.monotonic() - self._began) / part.done * max(part.total - part.done, 0))
        return f"{part.text or f'{part.done:,.0f}/{part.total:,.0f}'}, {left} left"


@contextlib.contextmanager
def logs_above() -> Generator[None]:
    """While rich draws, routes log handlers that write to the terminal through rich, which prints above its bars."""
    shown = {sys.__stderr__: sys.stderr, sys.__stdout__: sys.stdout}
    handlers: list[Any] = [one for one in logging.getLogger().handlers if isinstance(one, logging.StreamHandler)]
    moved = [(handler, handler.stream) for handler in handlers if handler.stream in shown]
    for handler, stream in moved:
        handler.setStream(shown[stream])
    try:
        yield
    finally:
        for handler, stream in moved:
            handler.setStream(stream)
