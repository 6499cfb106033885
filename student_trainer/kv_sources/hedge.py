"""A second request to another replica for samples that take unusually long, as in "The Tail at Scale"."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError

from kvcore.errors import ProtocolError, TeacherError
from kvcore.types import Sample
from student_trainer.kv_sources.base import KVResult
from student_trainer.kv_sources.replica import Endpoint
from student_trainer.kv_sources.retry_budget import RetryBudget

# Requests whose times are kept, and needed before the first hedge.
TIMES_KEPT, TIMES_NEEDED = 100, 10
QUANTILE = 0.95
# Below this delay, a second request costs more than it saves.
SHORTEST_DELAY_SECONDS = 0.05


class RecentTimes:
    """The seconds per sample of a teacher's last requests, on any replica."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=TIMES_KEPT)

    def add(self, seconds: float, samples: int) -> None:
        """Adds a completed request."""
        self._seconds.append(seconds / samples)

    def hedge_delay(self, samples: int) -> float | None:
        """Seconds within which 95 % of the requests for as many samples were answered; None if too few are known."""
        if len(self._seconds) < TIMES_NEEDED:
            return None
        rank = math.ceil(QUANTILE * len(self._seconds)) - 1
        return max(SHORTEST_DELAY_SECONDS, samples * sorted(self._seconds)[rank])


class Hedge:
    """Asks `other` for the samples that are missing after `delay_s`, and cancels the first request if it is slower.

    The caller's thread makes the first request and calls `end` after it, in any case.

    Args:
        first: the endpoint that the caller asks.
        other: the endpoint to ask after the delay. Until `end`, no other thread may use it.
        samples: of the first request.
        received: what the caller's thread has received, by sample id.
        delay_s: how long to wait.
        budget: the second request counts as a repeated one.
        verify: checks that `other` may be asked.
    """

    def __init__(
        self,
        first: Endpoint,
        other: Endpoint,
        samples: Sequence[Sample],
        received: Mapping[str, KVResult],
        delay_s: float,
        budget: RetryBudget,
        verify: Callable[[Endpoint], None],
    ) -> None:
        self.other = other
        self.asked: list[Sample] = []
        self.results: dict[str, KVResult] = {}
        self.error: TeacherError | ProtocolError | None = None
        self.won = False
        self.seconds = 0.0
        self._first, self._samples, self._received = first, samples, received
        self._delay_s, self._budget, self._verify = delay_s, budget, verify
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kv-hedge", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Cancels the second request if it still runs. Afterwards both endpoints can be used again."""
        self._ended.set()
        self.other.replica.cancel()
        self._thread.join()
        for endpoint in (self._first, self.other):
            endpoint.replica.resume()

    def _run(self) -> None:
        if self._ended.wait(self._delay_s):
            return
        asked = [sample for sample in self._samples if sample.id not in self._received]
        if not asked or not self._budget.spend_on_hedge():
            return
        self.asked = asked
        began = time.monotonic()
        try:
            self._verify(self.other)
            self.other.replica.fetch_into(asked, self.results)
        except CancelledError:
            return
        except (TeacherError, ProtocolError) as error:
            self.error = error
            return
        self.seconds = time.monotonic() - began
        self.won = True
        self._first.replica.cancel()
