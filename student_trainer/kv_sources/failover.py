"""Several replicas of one teacher as one source: another replica answers the samples that a failed one left open."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Protocol

from kvcore.errors import ProtocolError, TeacherMismatchError, TeacherUnavailableError
from kvcore.monitoring import tracing
from kvcore.plan import KVPlan
from kvcore.types import Sample, TeacherInfo
from student_trainer.kv_sources.base import EndpointHealth, KVResult, KVSource, SourceHealth

logger = logging.getLogger(__name__)

FIRST_BACKOFF_SECONDS = 0.5
LONGEST_BACKOFF_SECONDS = 8.0
# Enough to reach the longest; an unlimited power of two would overflow a float.
MAX_DOUBLINGS = 16


class Replica(Protocol):
    """One endpoint of a teacher. `RemoteSource` is the implementation over gRPC."""

    @property
    def endpoint(self) -> str: ...  # noqa: D102
    @property
    def plan(self) -> KVPlan: ...  # noqa: D102
    @property
    def retries(self) -> int: ...  # noqa: D102
    def connect(self) -> TeacherInfo: ...  # noqa: D102
    def fetch_into(self, samples: Sequence[Sample], received: dict[str, KVResult], /) -> None: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


@dataclass(slots=True, eq=False)
class _Endpoint:
    """One replica and its health. Times are monotonic seconds."""

    replica: Replica
    verified: bool = False
    failures: int = 0
    failed_at: float = -math.inf
    retry_at: float = -math.inf
    last_error: TeacherUnavailableError | ProtocolError | None = None

    @property
    def name(self) -> str:
        return self.replica.endpoint

    def fail(self, error: TeacherUnavailableError | ProtocolError) -> None:
        self.verified = False
        self.last_error = error
        self.failed_at = time.monotonic()
        doublings = min(self.failures, MAX_DOUBLINGS)
        self.retry_at = self.failed_at + min(LONGEST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2**doublings)
        self.failures += 1

    def recover(self) -> None:
        self.failures = 0
        self.failed_at = self.retry_at = -math.inf

    @property
    def problem(self) -> str:
        error = self.last_error
        return error.problem if isinstance(error, TeacherUnavailableError) else str(error)


class FailoverSource(KVSource):
    """Uses one replica while it answers. When it fails, requests the missing samples from the next one.

    Every sample comes from a single replica. Replicas must serve the same teacher, which is checked at every
    connection. A failed endpoint is not retried for 0.5 s, doubling up to 8 s.

    Args:
        teacher: the teacher's name in the configuration.
        replicas: at least one.
        patience_s: seconds without an answer, from the first failure on, after which the teacher counts as lost.
        start: index of the first replica, modulo their number; ranks start at different ones to share the load.
    """

    def __init__(self, teacher: str, replicas: Sequence[Replica], patience_s: float, start: int = 0) -> None:
        assert replicas, "a teacher without endpoints"
        self.switches = 0
        self._teacher = teacher
        self._endpoints = [_Endpoint(replica) for replica in replicas]
        self._current = self._endpoints[start % len(self._endpoints)]
        self._patience_s = patience_s
        self._reference: tuple[str, TeacherInfo, KVPlan] | None = None
        self._repeated = 0
        self._answered_at: float | None = None
        self._closed = threading.Event()

    @property
    def info(self) -> TeacherInfo:
        """The teacher that all replicas serve."""
        assert self._reference is not None, "call connect() first"
        return self._reference[1]

    @property
    def plan(self) -> KVPlan:
        """The plan made for this teacher."""
        assert self._reference is not None, "call connect() first"
        return self._reference[2]

    @property
    def retries(self) -> int:
        """Repeated requests, on the same endpoint or another one."""
        return self._repeated + sum(endpoint.replica.retries for endpoint in self._endpoints)

    def connect(self) -> TeacherInfo:
        """Connects to the first replica that answers, and checks that the others serve the same teacher.

        Raises:
            TeacherUnavailableError: no endpoint answered within the patience.
            TeacherMismatchError: two endpoints serve different teachers.
        """
        self.fetch(())
        for endpoint in self._endpoints:
            if not endpoint.verified and endpoint.failures == 0:
                try:
                    self._verify(endpoint)
                except (TeacherUnavailableError, ProtocolError) as error:
                    self._failed(endpoint, error, missing=0)
        return self.info

    def health(self) -> SourceHealth:
        """Health of the replicas. Callable from any thread."""
        answered_at = self._answered_at
        return SourceHealth(
            current=self._current.name,
            endpoints=tuple(EndpointHealth(one.name, one.problem if one.failures else None) for one in self._endpoints),
            answered_s_ago=None if answered_at is None else time.monotonic() - answered_at,
            switches=self.switches,
            retries=self.retries,
        )

    def fetch(self, samples: Sequence[Sample]) -> list[KVResult]:
        """Requests the samples from one replica after another until all are answered.

        Raises:
            TeacherUnavailableError: no endpoint answered within the patience; names each with its last error.
            TeacherRefusedError: the teacher will not serve this.
            TeacherMismatchError: an endpoint serves another teacher.
            ProtocolError: every endpoint sent damaged bytes, again after a retry.
            concurrent.futures.CancelledError: the source was closed.
        """
        ids = tracing.id_list(sample.id for sample in samples)
        with tracing.span("kv.fetch", attributes={"kvdistill.teacher": self._teacher, "kvdistill.sample_ids": ids}):
            return self._fetch(samples)

    def _fetch(self, samples: Sequence[Sample]) -> list[KVResult]:
        received: dict[str, KVResult] = {}
        ids = {sample.id for sample in samples}
        lost_since: float | None = None
        while True:
            endpoint = self._next_endpoint(lost_since)
            if lost_since is not None:
                self._repeated += 1
            before = len(received)
            try:
                self._verify(endpoint)
                endpoint.replica.fetch_into(samples, received)
            except (TeacherUnavailableError, ProtocolError) as error:
                self._failed(endpoint, error, missing=len(ids) - len(received))
                if lost_since is None or len(received) > before:
                    lost_since = endpoint.failed_at
            else:
                self._answered(endpoint)
                return [received[sample.id] for sample in samples]

    def close(self) -> None:
        """Closes every connection, which ends a fetch in progress."""
        self._closed.set()
        for endpoint in self._endpoints:
            endpoint.replica.close()

    def _next_endpoint(self, lost_since: float | None) -> _Endpoint:
        """Waits for the next endpoint that may be tried; raises when `patience_s` has passed."""
        while True:
            if self._closed.is_set():
                raise CancelledError(f"teacher '{self._teacher}': the source was closed")
            now = time.monotonic()
            give_up_at = math.inf if lost_since is None else lost_since + self._patience_s
            first = self._endpoints.index(self._current)
            in_turn = self._endpoints[first:] + self._endpoints[:first]
            ready = [endpoint for endpoint in in_turn if endpoint.retry_at <= now]
            untried = any(lost_since is not None and endpoint.failed_at < lost_since for endpoint in ready)
            if now >= give_up_at and not untried:
                raise self._lost(now - give_up_at + self._patience_s)
            if ready:
                return min(ready, key=lambda endpoint: endpoint.failed_at)
            wake_at = min(give_up_at, *(endpoint.retry_at for endpoint in self._endpoints))
            self._closed.wait(wake_at - now)

    def _verify(self, endpoint: _Endpoint) -> None:
        """Connects if needed, and checks that the endpoint serves the same teacher as before and as the others."""
        if endpoint.verified:
            return
        info = endpoint.replica.connect()
        if self._reference is None:
            self._reference = (endpoint.name, info, endpoint.replica.plan)
        name, expected, _ = self._reference
        if not info.same_teacher(expected):
            raise TeacherMismatchError(
                self._teacher,
                f"{endpoint.name} serves {_identity(info)}, but {name} served {_identity(expected)}. The endpoints of "
                "one teacher must be replicas of it: start them with the same model, or list them as two teachers",
            )
        endpoint.verified = True

    def _failed(self, endpoint: _Endpoint, error: TeacherUnavailableError | ProtocolError, missing: int) -> None:
        endpoint.fail(error)
        if endpoint.failures == 1:
            problem = f"{endpoint.name}: {endpoint.problem}"
            logger.warning("teacher '%s': %s; %d samples still to be answered", self._teacher, problem, missing)

    def _answered(self, endpoint: _Endpoint) -> None:
        self._answered_at = time.monotonic()
        endpoint.recover()
        if endpoint is not self._current:
            self.switches += 1
            logger.warning("teacher '%s': switched from %s to %s", self._teacher, self._current.name, endpoint.name)
            self._current = endpoint

    def _lost(self, seconds: float) -> TeacherUnavailableError | ProtocolError:
        errors = [endpoint.last_error for endpoint in self._endpoints]
        damage = [error for error in errors if isinstance(error, ProtocolError)]
        if len(damage) == len(errors):
            return damage[0]
        reports = "; ".join(f"{endpoint.name}: {endpoint.problem}" for endpoint in self._endpoints)
        return TeacherUnavailableError(
            self._teacher,
            f"no endpoint answered for {seconds:.1f} s ({reports}). Check that `kvdistill serve` runs there and is "
            "ready (/readyz on its HTTP port), then start the run again, which resumes from its last checkpoint; "
            "kv.patience_s sets how long a teacher may be unreachable",
        )


def _identity(info: TeacherInfo) -> str:
    return (
        f"{info.model} (weights {info.weights_digest[:12]}, tokenizer {info.tokenizer_fingerprint[:12]}, "
        f"{info.layers} layers x {info.kv_heads} KV heads x {info.head_dim})"
    )
