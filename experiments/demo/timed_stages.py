"""Progress lines and times of an experiment with several stages."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class TimedStages:
    """Prints what runs, with the time since the start. `seconds`: how long each stage took, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.monotonic()

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def say(self, line: str) -> None:
        """Prints one line of progress with the time since the start."""
        minutes, rest = divmod(int(self.elapsed()), 60)
        print(f"[{minutes:2d}:{rest:02d}]   {line}", flush=True)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Names a stage and measures its time, unless it fails."""
        began = self.elapsed()
        self.say(name)
        yield
        self.seconds[name] = self.elapsed() - began
        self.say(f"{name}: {self.seconds[name]:.0f} s")
