"""One replica of a teacher, and its health and speed as `FailoverSource` sees them."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvcore.errors import (
    EndpointRefusedError,
    ProtocolError,
    TeacherBusyError,
    TeacherMismatchError,
    TeacherUnavailableError,
)
from kvcore.plan import KVPlan
from kvcore.types import Sample, TeacherInfo
from student_trainer.kv_sources.base import KVResult
from student_trainer.kv_sources.retry_budget import RetryBudget

FIRST_BACKOFF_SECONDS = 0.5
FIRST_BUSY_SECONDS = 0.05
LONGEST_BACKOFF_SECONDS = 8.0
# Part of the longest time that a failed replica is left alone at least; the rest is random.
SHORTEST_PART = 0.1
# Enough to reach the longest; an unlimited power of two would overflow a float.
MAX_DOUBLINGS = 16

# A replica is left if it takes this many times as long per sample as another one, and this much longer.
SLOWER_TIMES, SLOWER_SECONDS = 4.0, 0.01
# Requests by whose median a replica is judged.
PACES_KEPT, PACES_NEEDED = 5, 3
# Seconds after which a replica that is not used is measured again, as it may have become faster or slower.
MEASURE_AGAIN_SECONDS = 300.0
# A replica is left if this many times in a row another one, asked later for the same samples, answered first.
MOST_OVERTAKEN = 3

# The training's generators are seeded alike on all ranks, which would then come back together.
_random = random.SystemRandom()

# What one endpoint can do wrong while another one of the same teacher serves.
EndpointError = TeacherUnavailableError | ProtocolError | EndpointRefusedError | TeacherMismatchError


class Replica(Protocol):
    """One endpoint of a teacher. `RemoteSource` is the implementation over gRPC."""

    waits_when_busy: bool
    budget: RetryBudget

    @property
    def endpoint(self) -> str: ...  # noqa: D102
    @property
    def plan(self) -> KVPlan: ...  # noqa: D102
    @property
    def retries(self) -> int: ...  # noqa: D102
    def connect(self) -> TeacherInfo: ...  # noqa: D102
    def fetch_into(self, samples: Sequence[Sample], received: dict[str, KVResult], /) -> None: ...  # noqa: D102
    def parity_kv(self) -> KVResult: ...  # noqa: D102
    def cancel(self) -> None: ...  # noqa: D102
    def resume(self) -> None: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


def busy_delay(asked_s: float, refusals: int) -> float:
    """Seconds until a full server is asked again: what it asked for, and a random part of 50 ms, doubling up to 8 s.

    Args:
        asked_s: the delay that the server asked for.
        refusals: how often it was full before, in a row.
    """
    longest = min(LONGEST_BACKOFF_SECONDS, FIRST_BUSY_SECONDS * 2 ** min(refusals, MAX_DOUBLINGS))
    return max(asked_s, FIRST_BUSY_SECONDS) + _random.uniform(0.0, longest)


@dataclass(slots=True, eq=False)
class Endpoint:
    """One replica and its health. Times are monotonic seconds.

    `verified`: it serves the teacher that the others serve, as of the last connection. `compared_at`: when its K/V were
    compared. `failures`, `refusals`: how often it failed, or was full, since it last answered. `paces`: seconds per
    sample of its last requests, `measured_at`: when the last of them ended. `overtaken`: how often in a row another
    replica answered before it.
    """

    replica: Replica
    verified: bool = False
    compared_at: float = -math.inf
    failures: int = 0
    refusals: int = 0
    failed_at: float = -math.inf
    retry_at: float = -math.inf
    last_error: EndpointError | None = None
    paces: deque[float] = field(default_factory=lambda: deque(maxlen=PACES_KEPT))
    measured_at: float = -math.inf
    overtaken: int = 0

    @property
    def name(self) -> str:
        """HOST:PORT."""
        return self.replica.endpoint

    @property
    def refuses(self) -> bool:
        """Whether waiting does not help: it is another service or teacher, or does not accept the caller's token."""
        return self.failures > 0 and isinstance(self.last_error, EndpointRefusedError | TeacherMismatchError)

    @property
    def problem(self) -> str:
        """Its last error, without the teacher's name."""
        error = self.last_error
        return str(error) if error is None or isinstance(error, ProtocolError) else error.problem

    @property
    def report(self) -> str:
        """Its name and last error."""
        return self.problem if self.problem.startswith(self.name) else f"{self.name}: {self.problem}"

    def fail(self, error: EndpointError) -> None:
        """Keeps it from being asked for a random part of 0.5 s, doubling up to 8 s. While it is full, for less."""
        self.last_error = error
        self.failed_at = time.monotonic()
        if isinstance(error, TeacherBusyError):
            self.retry_at = self.failed_at + busy_delay(error.wait_s, self.refusals)
            self.refusals += 1
            return
        self.verified = False
        longest = min(LONGEST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2 ** min(self.failures, MAX_DOUBLINGS))
        self.retry_at = self.failed_at + longest * _random.uniform(SHORTEST_PART, 1.0)
        self.failures += 1

    def recover(self) -> None:
        """It answered."""
        self.failures = self.refusals = 0
        self.failed_at = self.retry_at = -math.inf

    @property
    def ready(self) -> bool:
        """Whether it is expected to answer at once: it is connected, and its last request did not fail."""
        return self.verified and self.failed_at == -math.inf

    @property
    def to_be_measured(self) -> bool:
        """Whether its speed is not known, or was measured long ago."""
        return self.measured_at <= time.monotonic() - MEASURE_AGAIN_SECONDS

    def measure(self, seconds: float, samples: int) -> None:
        """It took this long for a request, or longer than this if another replica was faster."""
        if self.to_be_measured:
            self.paces.clear()
        self.paces.append(seconds / samples)
        self.measured_at = time.monotonic()

    @property
    def pace(self) -> float:
        """The usual seconds per sample; infinite if it has never been measured."""
        return statistics.median(self.paces) if self.paces else math.inf

    def is_slower_than(self, other: Endpoint) -> bool:
        """Whether it is so much slower that the other one is to be used."""
        if len(self.paces) < PACES_NEEDED or not other.paces:
            return False
        return self.pace > max(SLOWER_TIMES * other.pace, other.pace + SLOWER_SECONDS)
