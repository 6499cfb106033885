"""What a KV source is: samples in, encoded K/V out, in the same order. Sources compose by wrapping one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvcore.plan import KVPlan
from kvcore.types import EncodedSampleKV, MissingKV, Sample, TeacherInfo

KVResult = EncodedSampleKV | MissingKV


@dataclass(frozen=True, slots=True)
class EndpointHealth:
    """One replica: `problem` is what it last failed with, None while it is trusted to answer."""

    endpoint: str
    problem: str | None


@dataclass(frozen=True, slots=True)
class SourceHealth:
    """A teacher's replicas as one rank sees them.

    `current`: the endpoint that is asked. `answered_s_ago`: seconds since the teacher last answered a request whole,
    None if it never did. `switches`, `retries`: so far.
    """

    current: str
    endpoints: tuple[EndpointHealth, ...]
    answered_s_ago: float | None
    switches: int
    retries: int


class KVSource(Protocol):
    """One teacher under one plan, as a trainer's rank sees it."""

    @property
    def info(self) -> TeacherInfo:
        """The teacher's identity and geometry."""
        ...

    @property
    def plan(self) -> KVPlan:
        """The plan that every fetched sample follows."""
        ...

    def announce(self, samples: Sequence[Sample]) -> None:
        """Says that `samples` will be fetched soon, in this grouping. Only prefetching sources act on it."""
        ...

    def fetch(self, samples: Sequence[Sample]) -> list[KVResult]:
        """Blocks until every sample is answered; result i belongs to sample i.

        Raises:
            TeacherUnavailableError: nobody answers within the source's patience.
            TeacherRefusedError: the teacher will not serve this plan or these samples.
            ProtocolError: damaged bytes that a retry did not cure.
        """
        ...

    def close(self) -> None:
        """Ends threads, connections and files. Safe to call twice."""
        ...


class WrappingSource:
    """What every wrapper shares: it speaks for the same teacher under the same plan as the source inside."""

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
