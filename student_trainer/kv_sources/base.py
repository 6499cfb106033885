"""The KVSource interface: samples in, encoded K/V out, in the same order. Sources compose by wrapping one another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvcore.plan import KVPlan
from kvcore.types import EncodedSampleKV, MissingKV, Sample, TeacherInfo

KVResult = EncodedSampleKV | MissingKV


@dataclass(frozen=True, slots=True)
class EndpointHealth:
    """Health of one replica. `problem`: its last error, None while it is expected to answer."""

    endpoint: str
    problem: str | None


@dataclass(frozen=True, slots=True)
class SourceHealth:
    """Health of a teacher's replicas, as one rank sees it.

    `current`: the endpoint in use. `answered_s_ago`: seconds since the teacher last completed a request, None if it
    never did. `switches`: changes of endpoint. `retries`: repeated requests. `set_aside`: how often an endpoint refused
    its callers or served another teacher, while another one served. `hedges`: how often a second replica was asked
    because the first one took unusually long.
    """

    current: str
    endpoints: tuple[EndpointHealth, ...]
    answered_s_ago: float | None
    switches: int
    retries: int
    set_aside: int = 0
    hedges: int = 0


@dataclass(frozen=True, slots=True)
class PendingKV:
    """A submitted batch. `result` blocks until every sample is answered, and raises what `KVSource.fetch` does.

    Unlike a `concurrent.futures.Future` it may do its work in the thread that asks for the result, and it yields its
    result once.
    """

    result: Callable[[], list[KVResult]]


class KVSource(ABC):
    """One teacher under one plan, as one rank of the trainer sees it."""

    @property
    @abstractmethod
    def info(self) -> TeacherInfo:
        """The teacher's identity and geometry."""

    @property
    @abstractmethod
    def plan(self) -> KVPlan:
        """The plan that every fetched sample follows."""

    @abstractmethod
    def fetch(self, samples: Sequence[Sample]) -> list[KVResult]:
        """Blocks until every sample is answered; result i belongs to sample i.

        Raises:
            TeacherUnavailableError: no replica answers within `kv.patience_s`.
            TeacherRefusedError: the teacher will not serve this plan or these samples.
            ProtocolError: damaged bytes, again after a retry.
        """

    def submit(self, samples: Sequence[Sample]) -> PendingKV:
        """Requests samples without waiting for them. A source that does not prefetch fetches them in `result`."""
        return PendingKV(lambda: self.fetch(samples))

    def health(self) -> SourceHealth | None:
        """Health of the teacher's replicas; None if K/V come from a store. Callable from any thread."""
        return None

    def flush(self) -> None:  # noqa: B027 - a default, not abstract
        """Returns when everything recorded so far is on disk. Does nothing in a source that does not record.

        Raises:
            StoreError: the disk is full or failed.
        """

    def without_control(self) -> KVSource:
        """The source that gives each sample its own K/V, whatever `kv.control` says."""
        return self

    @abstractmethod
    def close(self) -> None:
        """Ends threads, connections and files. Safe to call twice."""


class WrappingSource(KVSource):
    """A source around another one, of the same teacher and plan. Subclasses override `submit`."""

    def __init__(self, source: KVSource) -> None:
        self.source = source

    @property
    def info(self) -> TeacherInfo:
        """The wrapped source's teacher."""
        return self.source.info

    @property
    def plan(self) -> KVPlan:
        """The wrapped source's plan."""
        return self.source.plan

    def fetch(self, samples: Sequence[Sample]) -> list[KVResult]:
        """Submits the samples and waits for them."""
        return self.submit(samples).result()

    def health(self) -> SourceHealth | None:
        """Health of the wrapped source's replicas."""
        return self.source.health()

    def flush(self) -> None:
        """Flushes the wrapped source."""
        self.source.flush()

    def close(self) -> None:
        """Closes the wrapped source."""
        self.source.close()
