"""Who is connected, what went wrong lately, and how much flows: for people who look. For the event loop's thread."""

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


@dataclass(slots=True, eq=False)
class Call:
    """What is known of a call while it runs, and when it ends."""

    method: str
    peer: str
    started: float = field(default_factory=time.perf_counter)
    request_id: str = ""
    codec: str = ""
    samples: int = 0
    failed_samples: int = 0
    tokens: int = 0
    written_tokens: int = 0
    frames: int = 0
    sent_bytes: int = 0
    first_frame_s: float | None = None
    code: str = grpc.StatusCode.OK.name
    problem: str = ""


_current: ContextVar[Call] = ContextVar("call")


def current_call() -> Call:
    """The call that this task answers; a fresh one outside of any."""
    return _current.get(Call("", ""))


@dataclass(slots=True)
class Problem:
    """Calls that failed in one way. `problem`, `peer` and `last` are the latest one's."""

    code: str
    method: str
    problem: str
    peer: str
    last: float
    count: int = 1


@dataclass(slots=True)
class Caller:
    """What one peer asked for since it was last away for a minute."""

    last: float = 0.0
    requests: int = 0
    samples: int = 0
    sent_bytes: int = 0


class Activity:
    """The calls of one server."""

    def __init__(self) -> None:
        self._open: dict[Call, None] = {}
        self._problems: dict[tuple[str, ...], Problem] = {}
        self._callers: dict[str, Caller] = {}
        self._ended_bytes = 0
        # Time, tokens and bytes since the start, the oldest first.
        self._totals: deque[tuple[float, float, float]] = deque()

    @contextlib.contextmanager
    def during(self, call: Call) -> Iterator[None]:
        """Shows a call while it runs; afterwards remembers how it failed, if it did."""
        _current.set(call)
        self._open[call] = None
        try:
            yield
        finally:
            self._open.pop(call)
            self._ended_bytes += call.sent_bytes
            self._count(call)
            self._remember(call)

    def _count(self, call: Call) -> None:
        self._forget_callers()
        # The longest away comes first.
        caller = self._callers[call.peer] = self._callers.pop(call.peer, Caller())
        caller.last = time.monotonic()
        caller.requests += 1
        caller.samples += call.samples
        caller.sent_bytes += call.sent_bytes
        if len(self._callers) > MAX_CALLERS:
            del self._callers[next(iter(self._callers))]

    def _forget_callers(self) -> None:
        since = time.monotonic() - WINDOW_SECONDS
        self._callers = {peer: caller for peer, caller in self._callers.items() if caller.last >= since}

    def _remember(self, call: Call) -> None:
        code, problem = call.code, call.problem
        if code == grpc.StatusCode.CANCELLED.name:
            return  # A caller may leave whenever it wants to.
        if code == grpc.StatusCode.OK.name:
            if not call.failed_samples:
                return
            code, problem = "SAMPLES_FAILED", f"{call.failed_samples} of {call.samples} samples failed"
        # A problem that comes back with other figures is the same one, or a busy hour would push all others out.
        key = (call.method, code, re.sub(r"\d+", "", problem))
        count = self._problems.pop(key).count + 1 if key in self._problems else 1
        self._problems[key] = Problem(code, call.method, problem[:MAX_PROBLEM_LENGTH], call.peer, time.time(), count)
        if len(self._problems) > MAX_PROBLEMS:
            del self._problems[next(iter(self._problems))]

    def sample(self, tokens: float) -> None:
        """Notes how much was done since the start. Called every few seconds, so that rates can be told.

        Args:
            tokens: that went through the model.
        """
        now = time.monotonic()
        self._totals.append((now, tokens, self._sent_bytes()))
        while now - self._totals[0][0] > WINDOW_SECONDS and len(self._totals) > 2:
            self._totals.popleft()

    def _sent_bytes(self) -> int:
        return self._ended_bytes + sum(call.sent_bytes for call in self._open)

    def throughput(self) -> dict[str, float]:
        """Tokens and bytes each second over the last minute, or since the start."""
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
        """Calls in progress, the oldest first."""
        now = time.perf_counter()
        return [
            {
                "peer": call.peer,
                "method": call.method,
                "request_id": call.request_id,
                "samples": call.samples,
                "tokens": call.tokens,
                "codec": call.codec,
                "sent_bytes": call.sent_bytes,
                "seconds": round(now - call.started, 3),
            }
            for call in self._open
        ]

    def callers(self) -> list[dict[str, Any]]:
        """Who ended a call within the last minute, the latest first; `seconds` ago."""
        self._forget_callers()
        now = time.monotonic()
        return [
            {
                "peer": peer,
                "requests": caller.requests,
                "samples": caller.samples,
                "sent_bytes": caller.sent_bytes,
                "seconds": round(now - caller.last, 3),
            }
            for peer, caller in reversed(self._callers.items())
        ]

    def problems(self) -> list[dict[str, Any]]:
        """How calls failed lately, the latest first."""
        return [
            {
                "time": datetime.fromtimestamp(one.last, UTC).isoformat(timespec="seconds"),
                "code": one.code,
                "method": one.method,
                "problem": one.problem,
                "peer": one.peer,
                "count": one.count,
            }
            for one in reversed(self._problems.values())
        ]
