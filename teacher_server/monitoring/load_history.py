"""A server's load over the last minutes, for the charts of its page. Used on the event loop's thread only."""

from __future__ import annotations

import itertools
import time
from collections import deque
from dataclasses import dataclass, field

KEPT_SECONDS = 900.0


@dataclass(frozen=True, slots=True)
class Load:
    """The load at one moment. `tokens` and `sent_bytes`: since the start. `time`: Unix seconds."""

    tokens: float
    sent_bytes: float
    open_requests: int
    queued_tokens: int
    time: float = field(default_factory=time.time)


class LoadHistory:
    """Samples of the last 15 minutes, oldest first."""

    def __init__(self) -> None:
        self._loads: deque[Load] = deque()

    def add(self, load: Load) -> None:
        """Keeps a sample and drops those that are too old."""
        self._loads.append(load)
        while load.time - self._loads[0].time > KEPT_SECONDS:
            self._loads.popleft()

    def curves(self) -> dict[str, list[tuple[float, float]]]:
        """Unix seconds and value of each point: rates between two samples, and counts at a sample."""
        curves: dict[str, list[tuple[float, float]]] = {
            name: [] for name in ("tokens_per_second", "bytes_per_second", "open_requests", "queued_tokens")
        }
        loads = list(self._loads)
        for before, load in itertools.pairwise(loads):
            seconds = max(load.time - before.time, 1e-3)
            for name, value in (
                ("tokens_per_second", (load.tokens - before.tokens) / seconds),
                ("bytes_per_second", (load.sent_bytes - before.sent_bytes) / seconds),
                ("open_requests", load.open_requests),
                ("queued_tokens", load.queued_tokens),
            ):
                curves[name].append((load.time, value))
        return curves
