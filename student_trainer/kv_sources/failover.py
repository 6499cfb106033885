"""Several replicas of one teacher seen as one source: what a lost replica left open, another one answers."""

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
from student_trainer.kv_sources.base import EndpointHealth, KVResult, SourceHealth

logger = logging.getLogger(__name__)

FIRST_BACKOFF_SECONDS = 0.5
LONGEST_BACKOFF_SECONDS = 8.0
# Enough to reach the longest; without a limit a power of two would one day be no float.
MOST_DOUBLINGS = 16


class Replica(Protocol):
    """One endpoint of a teacher."""

    @property
    def endpoint(self) -> str:
        """host:port."""
        ...

    @property
    def plan(self) -> KVPlan:
        """The plan made for this teacher's geometry; known once connected."""
        ...

    @property
    def retries(self) -> int:
        """Requests repeated on this endpoint alone."""
        ...

    def connect(self) -> TeacherInfo:
        """Asks who serves there.

        Raises:
            TeacherUnavailableError: nobody answers.
        """
        ...

    def fetch_into(self, samples: Sequence[Sample], answers: list[KVResult | None]) -> None:
        """Fills every `answers[i]` that is None with sample i's result; what arrived before an error stays.

        Raises:
            TeacherUnavailableError: the endpoint does not answer, or stopped answering.
            TeacherRefusedError: the teacher will not serve this.
            ProtocolError: damaged bytes, twice.
        """
        ...

    def close(self) -> None:
        """Ends the connection and whatever waits on it."""
        ...


@dataclass(slots=True, eq=False)
class _Endpoint:
    """What is known about one replica's health; times are monotonic seconds."""

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
        doublings = min(self.failures, MOST_DOUBLINGS)
        self.retry_at = self.failed_at + min(LONGEST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2**doublings)
        self.failures += 1

    def recover(self) -> None:
        self.failures = 0
        self.failed_at = self.retry_at = -math.inf

    def report(self) -> str:
        return f"{self.name}: {self.problem}"

    @property
    def problem(self) -> str:
        error = self.last_error
        return error.problem if isinstance(error, TeacherUnavailableError) else str(error)


class FailoverSource:
    """Stays with one replica while it answers; when it fails, asks the next for the samples still missing.

    Every sample comes whole from one replica. Replicas must serve the same teacher, which is checked at every
    connection. An endpoint that failed is left alone for 0.5 s, doubling up to 8 s.

    Args:
        teacher: the teacher's name in the configuration.
        replicas: at least one.
        patience_s: seconds without any answer, counted from the first failure, after which the teacher is lost.
        start: the replica to begin with, modulo their number; ranks start apart to share the load.
    """

    def __init__(self, teacher: str, replicas: Sequence[Replica], patience_s: float, start: int = 0) -> None:
        assert replicas, "a teacher without endpoints"
        self.switches = 0
        self._teacher = teacher
        self._endpoints = [_Endpoint(replica) for replica in replicas]
        self._current = self._endpoints[start % len(self._endpoints)]
        self._patience_s = patience_s
        self._reference: tuple[str, TeacherInfo, KVPlan] | None = None
        self._attempts_repeated = 0
        self._answered_at: float | None = None
        self._closed = threading.Event()

    @property
    def info(self) -> TeacherInfo:
        """The teacher all replicas serve."""
        assert self._reference is not None, "connect() comes first"
        return self._reference[1]

    @property
    def plan(self) -> KVPlan:
        """The plan made for this teacher."""
        assert self._reference is not None, "connect() comes first"
        return self._reference[2]

    @property
    def retries(self) -> int:
        """Requests that had to be repeated: on the same endpoint or on another."""
        return self._attempts_repeated + sum(endpoint.replica.retries for endpoint in self._endpoints)

    def connect(self) -> TeacherInfo:
        """Finds a replica that answers, and compares the others that do with it.

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
        """How the replicas do; from any thread."""
        answered_at = self._answered_at
        return SourceHealth(
            current=self._current.name,
            endpoints=tuple(EndpointHealth(one.name, one.problem if one.failures else None) for one in self._endpoints),
            answered_s_ago=None if answered_at is None else time.monotonic() - answered_at,
            switches=self.switches,
            retries=self.retries,
        )

    def announce(self, samples: Sequence[Sample]) -> None:
        """Does nothing: this source does not prefetch."""

    def fetch(self, samples: Sequence[Sample]) -> list[KVResult]:
        """Asks until every sample is answered, whichever replicas it takes.

        Raises:
            TeacherUnavailableError: no endpoint answered within the patience; names each with its last error.
            TeacherRefusedError: the teacher will not serve this.
            TeacherMismatchError: an endpoint serves another teacher.
            ProtocolError: every endpoint sent damaged bytes, again after a retry.
            concurrent.futures.CancelledError: the source was closed meanwhile.
        """
        ids = tracing.id_list(sample.id for sample in samples)
        with tracing.span("kv.fetch", attributes={"kvdistill.teacher": self._teacher, "kvdistill.sample_ids": ids}):
            return self._fetch(samples)

    def _fetch(self, samples: Sequence[Sample]) -> list[KVResult]:
        answers: list[KVResult | None] = [None] * len(samples)
        lost_since: float | None = None
        while True:
            endpoint = self._next_endpoint(lost_since)
            if lost_since is not None:
                self._attempts_repeated += 1
            missing = answers.count(None)
            try:
                self._verify(endpoint)
                endpoint.replica.fetch_into(samples, answers)
            except (TeacherUnavailableError, ProtocolError) as error:
                still_missing = answers.count(None)
                self._failed(endpoint, error, still_missing)
                if lost_since is None or still_missing < missing:
                    lost_since = endpoint.failed_at
            else:
                self._answered(endpoint)
                return [answer for answer in answers if answer is not None]

    def close(self) -> None:
        """Ends every connection; a fetch under way ends too."""
        self._closed.set()
        for endpoint in self._endpoints:
            endpoint.replica.close()

    def _next_endpoint(self, lost_since: float | None) -> _Endpoint:
        """The endpoint whose turn it is, after waiting for it; raises once patience has run out."""
        while True:
            if self._closed.is_set():
                raise CancelledError(f"teacher '{self._teacher}': the source was closed")
            now = time.monotonic()
            give_up_at = math.inf if lost_since is None else lost_since + self._patience_s
            ready = [endpoint for endpoint in self._in_turn() if endpoint.retry_at <= now]
            untried = any(lost_since is not None and endpoint.failed_at < lost_since for endpoint in ready)
            if now >= give_up_at and not untried:
                raise self._lost(now - give_up_at + self._patience_s)
            if ready:
                return min(ready, key=lambda endpoint: endpoint.failed_at)
            wake_at = min(give_up_at, *(endpoint.retry_at for endpoint in self._endpoints))
            self._closed.wait(wake_at - now)

    def _in_turn(self) -> list[_Endpoint]:
        """From the current endpoint on, round the circle."""
        first = self._endpoints.index(self._current)
        return self._endpoints[first:] + self._endpoints[:first]

    def _verify(self, endpoint: _Endpoint) -> None:
        """Connects where needed, and makes sure that the same teacher answers as before and elsewhere."""
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
            logger.warning(
                "teacher '%s': %s; %d samples still to be answered", self._teacher, endpoint.report(), missing
            )

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
        reports = "; ".join(endpoint.report() for endpoint in self._endpoints)
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
