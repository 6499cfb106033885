"""Open calls, recent callers, recent errors and throughput. Used on the event loop's thread only."""

from __future__ import annotations

import contextlib
import re
import time
from collections import deque
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import grpc

MAX_PROBLEMS = 20
MAX_PROBLEM_LENGTH = 300
MAX_CALLERS = 256
WINDOW_SECONDS = 60.0

_SHOWN_OF_CALLER = ("peer", "requests", "samples", "sent_bytes")
_SHOWN_OF_CALL = ("peer", "method", "request_id", "samples", "tokens", "codec", "sent_bytes", "shared_bytes")


@dataclass(slots=True, eq=False)
class Call:
    """The record of one call, filled in while it runs.

    `started`: on the clock of `time.perf_counter`. `shared_bytes`: the part of `sent_bytes` in shared memory.
    """

    method: str
    peer: str
    started: float = field(default_factory=time.perf_counter)
    request_id: str = ""
    codec: str = ""
    samples: int = 0
    failed_samples: int = 0
    tokens: int = 0
    generated_tokens: int = 0
    frames: int = 0
    sent_bytes: int = 0
    shared_bytes: int = 0
    first_frame_s: float | None = None
    code: str = grpc.StatusCode.OK.name
    problem: str = ""


_current: ContextVar[Call] = ContextVar("call")


def current_call() -> Call:
    """The call that this task answers; a new record outside of any call, as in the self-test."""
    return _current.get(Call("", ""))


@dataclass(slots=True)
class Caller:
    """The calls of one peer since it was last idle for a minute. `last`: when the latest one ended."""

    peer: str
    last: float = 0.0
    requests: int = 0
    samples: int = 0
    sent_bytes: int = 0


class Activity:
    """The calls of one server."""

    def __init__(self) -> None:
        self._open: dict[Call, None] = {}
        self._problems: dict[tuple[str, ...], dict[str, Any]] = {}
        self._callers: dict[str, Caller] = {}
        self._ended_bytes = 0
        # Time, and tokens and bytes since the start, oldest first.
        self._totals: deque[tuple[float, float, float]] = deque()

    @contextlib.contextmanager
    def during(self, call: Call) -> Iterator[None]:
        """Show a call while it runs; afterwards count it for its caller, and record its error if it failed."""
        _current.set(call)
        self._open[call] = None
        try:
            yield
        finally:
            self._open.pop(call)
            self._ended_bytes += call.sent_bytes
            self._count(call)
            self._record_problem(call)

    def _count(self, call: Call) -> None:
        self._forget_callers()
        # Ordered by the latest call, oldest first.
        caller = self._callers[call.peer] = self._callers.pop(call.peer, Caller(call.peer))
        caller.last = time.monotonic()
        caller.requests += 1
        caller.samples += call.samples
        caller.sent_bytes += call.sent_bytes
        if len(self._callers) > MAX_CALLERS:
            del self._callers[next(iter(self._callers))]

    def _forget_callers(self) -> None:
        since = time.monotonic() - WINDOW_SECONDS
        self._callers = {peer: caller for peer, caller in self._callers.items() if caller.last >= since}

    def _record_problem(self, call: Call) -> None:
        code, problem = call.code, call.problem
        if code == grpc.StatusCode.CANCELLED.name:
            return  # A caller may cancel at any time.
        if code == grpc.StatusCode.OK.name:
            if not call.failed_samples:
                return
            code, problem = "SAMPLES_FAILED", f"{call.failed_samples} of {call.samples} samples failed"
        # Problems that differ in numbers only count as one, so that a busy hour does not push out all others.
        key = (call.method, code, re.sub(r"\d+", "", problem))
        count = self._problems.pop(key)["count"] + 1 if key in self._problems else 1
        self._problems[key] = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "code": code,
            "method": call.method,
            "problem": problem[:MAX_PROBLEM_LENGTH],
            "peer": call.peer,
            "count": count,
        }
        if len(self._problems) > MAX_PROBLEMS:
            del self._problems[next(iter(self._problems))]

    @property
    def sent_bytes(self) -> int:
        """Bytes of K/V sent since the start."""
        return self._ended_bytes + sum(call.sent_bytes for call in self._open)

    def sample(self, tokens: float) -> None:
        """Record the totals since the start; called every few seconds.

        Args:
            tokens: total of the tokens that went through the model.
        """
        now = time.monotonic()
        self._totals.append((now, tokens, self.sent_bytes))
        while now - self._totals[0][0] > WINDOW_SECONDS and len(self._totals) > 2:
            self._totals.popleft()

    def throughput(self) -> dict[str, float]:
        """Tokens and bytes per second over the last minute, or since the start."""
        seconds = self._totals[-1][0] - self._totals[0][0] if self._totals else 0.0
        if not seconds:
            return {"seconds": 0.0, "tokens_per_second": 0.0, "bytes_per_second": 0.0}
        tokens, sent = (self._totals[-1][part] - self._totals[0][part] for part in (1, 2))
        return {
            "seconds": round(seconds, 1),
            "tokens_per_second": round(tokens / seconds, 1),
            "bytes_per_second": round(sent / seconds, 1),
        }

    def connections(self) -> list[dict[str, Any]]:
        """Open calls, oldest first; `seconds` since their start."""
        now = time.perf_counter()
        return [
            {name: getattr(call, name) for name in _SHOWN_OF_CALL} | {"seconds": round(now - call.started, 3)}
            for call in self._open
        ]

    def callers(self) -> list[dict[str, Any]]:
        """Peers that ended a call within the last minute, latest first; `seconds` since their latest call ended."""
        self._forget_callers()
        now = time.monotonic()
        return [
            {name: getattr(caller, name) for name in _SHOWN_OF_CALLER} | {"seconds": round(now - caller.last, 3)}
            for caller in reversed(self._callers.values())
        ]

    def problems(self) -> list[dict[str, Any]]:
        """Recent kinds of errors, latest first; `count` calls failed alike, and the other values are the latest's."""
        return [dict(problem) for problem in reversed(self._problems.values())]
