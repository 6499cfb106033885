"""Several replicas of one teacher as one source: if one fails, another one answers the remaining samples."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError

from kvcore.errors import (
    EndpointRefusedError,
    FieldError,
    ProtocolError,
    TeacherBusyError,
    TeacherMismatchError,
    TeacherUnavailableError,
)
from kvcore.monitoring import tracing
from kvcore.plan import KVPlan
from kvcore.types import Sample, TeacherInfo
from student_trainer.kv_sources.base import EndpointHealth, KVResult, KVSource, SourceHealth
from student_trainer.kv_sources.ended_requests import EndedRequests
from student_trainer.kv_sources.hedge import Hedge, RecentTimes
from student_trainer.kv_sources.parity import ParityCheck
from student_trainer.kv_sources.replica import MOST_OVERTAKEN, PACES_NEEDED, Endpoint, EndpointError, Replica
from student_trainer.kv_sources.retry_budget import RetryBudget

logger = logging.getLogger(__name__)


class FailoverSource(KVSource):
    """Uses one replica while it answers. When it fails, requests the missing samples from the next one.

    Every sample comes from a single replica. Replicas must serve the same teacher, which is checked at every
    connection. An endpoint that fails, refuses its callers or serves another teacher is set aside while another one
    answers. It is not retried for a random part of 0.5 s, doubling up to 8 s. If its queue is full, the others are
    tried before it is waited for. Each replica is measured, again every 5 minutes, and one that is several times slower
    than another is left. If an answer takes longer than 95 % of the ones before, another replica is asked for the same
    samples, and the first answer counts. `RetryBudget` limits repeated requests.

    Args:
        teacher: the teacher's name in the configuration.
        replicas: at least one.
        patience_s: seconds without an answer, from the first failure on, after which the teacher counts as lost.
        start: index of the first replica, modulo their number; ranks start at different ones to share the load.
        waits_once: once the teacher is lost, later fetches fail at once until a replica answers again.
        hedge: whether another replica is asked for samples whose answer takes unusually long.
    """

    def __init__(
        self,
        teacher: str,
        replicas: Sequence[Replica],
        patience_s: float,
        start: int = 0,
        *,
        waits_once: bool = False,
        hedge: bool = True,
    ) -> None:
        assert replicas, "a teacher without endpoints"
        self.switches = self.set_aside = self.hedges = 0
        self._teacher = teacher
        self._endpoints = [Endpoint(replica) for replica in replicas]
        self._budget = RetryBudget(len(replicas))
        for replica in replicas:
            replica.waits_when_busy = False
            replica.budget = self._budget
        self._current = self._endpoints[start % len(self._endpoints)]
        self._patience_s = patience_s
        self._waits_once = waits_once
        self._times = RecentTimes() if hedge and len(replicas) > 1 else None
        self._parity = ParityCheck(teacher) if len(replicas) > 1 else None
        self._lost_since: float | None = None
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
            EndpointRefusedError: every endpoint refuses.
            TeacherMismatchError: two endpoints serve different teachers. Nothing says yet which of them is right, and
                another rank could choose the other one.
        """
        self.fetch(())
        for endpoint in self._endpoints:
            if not endpoint.verified and endpoint.failures == 0:
                try:
                    self._verify(endpoint)
                except (TeacherUnavailableError, ProtocolError, EndpointRefusedError) as error:
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
            set_aside=self.set_aside,
            hedges=self.hedges,
        )

    def fetch(self, samples: Sequence[Sample]) -> list[KVResult]:
        """Requests the samples from one replica after another until all are answered.

        Raises:
            TeacherUnavailableError: no endpoint answered within the patience; names each with its last error.
            TeacherRefusedError: the teacher will not serve this, or every endpoint refuses its callers.
            TeacherMismatchError: every endpoint serves another teacher than before.
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
        ended = EndedRequests(self._teacher)
        self._budget.note_request()
        while True:
            endpoint = self._next_endpoint(lost_since)
            if lost_since is not None:
                self._budget.spend()
                self._repeated += 1
            before = len(received)
            requested = ended.next_request(samples, received)
            try:
                self._verify(endpoint)
                self._fetch_from(endpoint, requested, received, ended, may_hedge=lost_since is None)
            except (TeacherUnavailableError, ProtocolError, EndpointRefusedError, TeacherMismatchError) as error:
                self._failed(endpoint, error, missing=len(ids) - len(received))
                ended.give_up(samples, received)
                if lost_since is None or len(received) > before:
                    lost_since = endpoint.failed_at
            else:
                self._answered(endpoint)
                ended.give_up(samples, received)
                lost_since = None
            # Without samples, the fetch is complete when an endpoint has been verified.
            if len(received) == len(ids) and (ids or lost_since is None):
                return [received[sample.id] for sample in samples]

    def _fetch_from(
        self,
        endpoint: Endpoint,
        requested: Sequence[Sample],
        received: dict[str, KVResult],
        ended: EndedRequests,
        *,
        may_hedge: bool,
    ) -> None:
        began = time.monotonic()
        hedge = self._begin_hedge(endpoint, requested, received) if may_hedge and requested else None
        overtaken = False
        try:
            endpoint.replica.fetch_into(requested, received)
        except CancelledError:
            overtaken = hedge is not None and hedge.won
            if not overtaken:
                raise
        except TeacherBusyError:
            raise
        except TeacherUnavailableError as error:
            ended.note(requested, received, endpoint.name, error)
            raise
        finally:
            if hedge is not None:
                hedge.end()
                self._take(hedge, received, ended)
        if requested:
            self._measure(endpoint, time.monotonic() - began, len(requested), hedge if overtaken else None)

    def _begin_hedge(
        self, endpoint: Endpoint, requested: Sequence[Sample], received: dict[str, KVResult]
    ) -> Hedge | None:
        delay_s = None if self._times is None else self._times.hedge_delay(len(requested))
        others = [one for one in self._endpoints if one.ready and one is not endpoint]
        if delay_s is None or not others:
            return None
        other = min(others, key=lambda one: one.pace)
        return Hedge(endpoint, other, requested, received, delay_s, self._budget, self._verify)

    def _take(self, hedge: Hedge, received: dict[str, KVResult], ended: EndedRequests) -> None:
        """Keeps what the second request of a hedge has brought."""
        for sample_id, result in hedge.results.items():
            received.setdefault(sample_id, result)
        self.hedges += bool(hedge.asked)
        if isinstance(hedge.error, EndpointError):
            self._failed(hedge.other, hedge.error, missing=0)
            if isinstance(hedge.error, TeacherUnavailableError) and not isinstance(hedge.error, TeacherBusyError):
                ended.note(hedge.asked, received, hedge.other.name, hedge.error)

    def _measure(self, endpoint: Endpoint, seconds: float, samples: int, overtaken_by: Hedge | None) -> None:
        """Notes how long a request took, and leaves a replica that another one has overtaken several times in a row."""
        endpoint.measure(seconds, samples)
        if overtaken_by is None:
            endpoint.overtaken = 0
            if self._times is not None:
                self._times.add(seconds, samples)
            return
        assert self._times is not None, "there is no hedge without times"
        other = overtaken_by.other
        other.measure(overtaken_by.seconds, len(overtaken_by.asked))
        self._times.add(overtaken_by.seconds, len(overtaken_by.asked))
        endpoint.overtaken += 1
        logger.debug("teacher '%s': %s answered before %s", self._teacher, other.name, endpoint.name)
        if endpoint is self._current and endpoint.overtaken >= MOST_OVERTAKEN:
            endpoint.overtaken = 0
            self._switch_to(other, f" (it answered first {MOST_OVERTAKEN} times in a row)", logging.WARNING)

    def close(self) -> None:
        """Closes every connection, which ends a fetch in progress."""
        self._closed.set()
        for endpoint in self._endpoints:
            endpoint.replica.close()

    def _next_endpoint(self, lost_since: float | None) -> Endpoint:
        """Waits for the next endpoint that may be tried; raises when `patience_s` has passed."""
        while True:
            if self._closed.is_set():
                raise CancelledError(f"teacher '{self._teacher}': the source was closed")
            if lost_since is not None and all(one.refuses and one.failed_at >= lost_since for one in self._endpoints):
                raise self._refused()
            now = time.monotonic()
            give_up_at = math.inf if lost_since is None else lost_since + self._patience_s
            if self._lost_since is not None and self._waits_once:
                give_up_at = now
            budget_at = now if lost_since is None else now + self._budget.wait_s()
            ready = [endpoint for endpoint in self._in_turn() if endpoint.retry_at <= now] if budget_at <= now else []
            untried = any(lost_since is not None and endpoint.failed_at < lost_since for endpoint in ready)
            if now >= give_up_at and not (untried or (ready and lost_since is None)):
                self._lost_since = self._lost_since or lost_since or now
                raise self._lost(now - self._lost_since)
            if lost_since is None and (other := self._faster_or_unmeasured()):
                return other
            if ready:
                return min(ready, key=lambda endpoint: endpoint.failed_at)
            wake_at = min(give_up_at, max(budget_at, min(endpoint.retry_at for endpoint in self._endpoints)))
            self._closed.wait(wake_at - now)

    def _faster_or_unmeasured(self) -> Endpoint | None:
        """Another replica to ask, if the current one is several times slower, or its speed is not known any more."""
        current = self._current
        # In turn from its own replica: otherwise all ranks would measure the first replica at the same time.
        others = [one for one in self._in_turn() if one.ready and one is not current]
        if not others or not current.ready or len(current.paces) < PACES_NEEDED:
            return None
        other = next((one for one in others if one.to_be_measured), min(others, key=lambda one: one.pace))
        return other if other.to_be_measured or current.is_slower_than(other) else None

    def _in_turn(self) -> list[Endpoint]:
        """All endpoints, from the current one on."""
        first = self._endpoints.index(self._current)
        return self._endpoints[first:] + self._endpoints[:first]

    def _verify(self, endpoint: Endpoint) -> None:
        """Connects if needed, and checks that the endpoint serves the same teacher as before and as the others."""
        if not endpoint.verified:
            self._check_identity(endpoint)
        if self._parity is not None:
            self._parity.check(endpoint)
        endpoint.verified = True

    def _check_identity(self, endpoint: Endpoint) -> None:
        try:
            info = endpoint.replica.connect()
        except FieldError as error:
            if self._reference is None:
                raise
            # The plan could be made for the other replicas, so this one has another geometry.
            raise TeacherMismatchError(self._teacher, f"{endpoint.name}: {error}") from error
        if self._reference is None:
            self._reference = (endpoint.name, info, endpoint.replica.plan)
        name, expected, _ = self._reference
        if not info.same_teacher(expected):
            raise TeacherMismatchError(
                self._teacher,
                f"{endpoint.name} serves {_identity(info)}, but {name} served {_identity(expected)}. The endpoints of "
                "one teacher must be replicas of it: start them with the same model, or list them as two teachers",
            )

    def _failed(self, endpoint: Endpoint, error: EndpointError, missing: int) -> None:
        refused_before = endpoint.refuses
        endpoint.fail(error)
        if isinstance(error, TeacherBusyError):
            return
        newly_refused = endpoint.refuses and not refused_before
        self.set_aside += newly_refused
        if endpoint.failures == 1 or newly_refused:
            aside = "; it is not used while another replica works" if endpoint.refuses else ""
            still = f"{missing} samples are still to be fetched"
            logger.warning("teacher '%s': %s%s; %s", self._teacher, endpoint.report, aside, still)

    def _answered(self, endpoint: Endpoint) -> None:
        self._answered_at = time.monotonic()
        self._lost_since = None
        endpoint.recover()
        before, slower = self._current, self._current.is_slower_than(endpoint)
        if endpoint is before or (before.ready and not slower):
            return
        if slower:
            why = f" ({before.pace:.3f} against {endpoint.pace:.3f} s per sample)"
        else:
            why = " (its queue is full)" if before.refusals else ""
        self._switch_to(endpoint, why, logging.INFO if before.refusals else logging.WARNING)

    def _switch_to(self, endpoint: Endpoint, why: str, level: int) -> None:
        before, self._current = self._current, endpoint
        self.switches += 1
        logger.log(level, "teacher '%s': switched from %s to %s%s", self._teacher, before.name, endpoint.name, why)

    def _refused(self) -> EndpointError:
        """The error of the only endpoint, or one that names all of them."""
        if len(self._endpoints) == 1:
            error = self._endpoints[0].last_error
            assert error is not None
            return error
        reports = "; ".join(endpoint.report for endpoint in self._endpoints)
        return EndpointRefusedError(self._teacher, f"no endpoint serves it ({reports})")

    def _lost(self, seconds: float) -> TeacherUnavailableError | ProtocolError:
        errors = [endpoint.last_error for endpoint in self._endpoints]
        damage = [error for error in errors if isinstance(error, ProtocolError)]
        if len(damage) == len(errors):
            return damage[0]
        reports = "; ".join(endpoint.report for endpoint in self._endpoints)
        if all(isinstance(error, TeacherBusyError) for error in errors):
            problem = f"still full after {seconds:.1f} s ({reports}); add a replica, or raise kv.patience_s"
            return TeacherBusyError(self._teacher, problem)
        return TeacherUnavailableError(
            self._teacher,
            f"no endpoint answered for {seconds:.1f} s ({reports}). Check that `kvdistill serve` runs there and is "
            "ready (/readyz on its HTTP port). Then start the run again: it resumes from its last checkpoint. "
            "kv.patience_s sets how long a teacher may be unreachable.",
        )


def _identity(info: TeacherInfo) -> str:
    return (
        f"{info.model} (weights {info.weights_digest[:12]}, tokenizer {info.tokenizer_fingerprint[:12]}, "
        f"{info.layers} layers x {info.kv_heads} KV heads x {info.head_dim})"
    )
