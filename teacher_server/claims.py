"""Decides which refused request is admitted next: no large request, and no caller with few requests, starves."""

from __future__ import annotations

import time
from dataclasses import dataclass

from teacher_server.fair_share import Caller, FairShare

# A caller that does not repeat its request within twice the announced time, plus this, loses its claim.
GRACE_SECONDS = 1.0

# A request and its repetitions: their caller and their size in bytes.
RequestKey = tuple[Caller, int]


@dataclass(frozen=True, slots=True)
class _Claim:
    """Room for a refused request. `since`: when it was refused first."""

    since: float
    tokens: int
    expires: float


class Claims:
    """The refused requests that their callers are expected to repeat.

    A claim goes before another one if its caller was admitted with fewer tokens, or if these are equal and it is older.
    """

    def __init__(self) -> None:
        self._claims: dict[RequestKey, _Claim] = {}
        self._admitted = FairShare()

    def since(self, key: RequestKey) -> float:
        """When this request was refused first; now, if it was not."""
        claim = self._claims.get(key)
        return time.monotonic() if claim is None else claim.since

    def ahead_of(self, key: RequestKey, since: float) -> int:
        """Tokens of the claims that go before a request that was refused first at `since`."""
        now, own = time.monotonic(), (self._admitted.use(key[0]), since)
        self._claims = {other: claim for other, claim in self._claims.items() if claim.expires > now}
        return sum(
            claim.tokens
            for other, claim in self._claims.items()
            if other != key and (self._admitted.use(other[0]), claim.since) < own
        )

    def add(self, key: RequestKey, since: float, tokens: int, retry_ms: int) -> None:
        """Record that a request was refused, and when its caller was told to repeat it."""
        self._claims[key] = _Claim(since, tokens, time.monotonic() + 2 * retry_ms / 1000 + GRACE_SECONDS)

    def settle(self, key: RequestKey, tokens: int) -> None:
        """Record that a request was admitted."""
        self._claims.pop(key, None)
        self._admitted.next(dict.fromkeys([key[0], *(other[0] for other in self._claims)], 0.0))
        self._admitted.charge(key[0], tokens)
