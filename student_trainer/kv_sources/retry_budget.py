"""Limits how often one rank repeats requests to a teacher, so that many ranks do not flood servers in trouble."""

from __future__ import annotations

import threading
import time
from collections import deque

# In any window of this many seconds, a rank repeats a fifth of the requests that it made, and a fixed number more. That
# number is enough to find the one replica that answers, and to notice within seconds that a server is back.
WINDOW_SECONDS = 10.0
RATIO = 0.2
ALLOWED, ALLOWED_PER_REPLICA = 10, 5


class RetryBudget:
    """The repeated requests that are left to one rank for one teacher. Callable from any thread.

    All replicas share it. Repetitions on the same replica, on another one, and hedges count alike.

    Args:
        replicas: number of replicas.
    """

    def __init__(self, replicas: int = 1) -> None:
        self._fixed = max(ALLOWED, ALLOWED_PER_REPLICA * replicas)
        self._lock = threading.Lock()
        self._requests: deque[float] = deque()
        self._repeated: deque[float] = deque()

    def note_request(self) -> None:
        """Counts a request that repeats none."""
        with self._lock:
            self._requests.append(self._now())

    def wait_s(self) -> float:
        """Seconds until a request may be repeated; 0 if it may be now."""
        with self._lock:
            now = self._now()
            if len(self._repeated) + 1 <= self._allowed():
                return 0.0
            return max(0.0, self._repeated[0] + WINDOW_SECONDS - now) + 0.001

    def spend(self) -> None:
        """Counts a repeated request."""
        with self._lock:
            self._repeated.append(self._now())

    def spend_on_hedge(self) -> bool:
        """Counts a hedge if there is room for it: hedges leave half of the budget to requests that failed."""
        with self._lock:
            now = self._now()
            if len(self._repeated) + 1 > self._allowed() / 2:
                return False
            self._repeated.append(now)
            return True

    def _allowed(self) -> float:
        return self._fixed + RATIO * len(self._requests)

    def _now(self) -> float:
        """The time, after what is older than the window was dropped."""
        now = time.monotonic()
        for times in (self._requests, self._repeated):
            while times and times[0] <= now - WINDOW_SECONDS:
                times.popleft()
        return now
