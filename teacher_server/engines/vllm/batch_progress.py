"""One batch on its way through vLLM: what its workers and its scheduler say, told to the batch's caller."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from teacher_server.engines.base import Emit, ExecutionTimings, Fail, SampleFailure, Wanted
from teacher_server.engines.vllm.assembly import Assembly
from teacher_server.engines.vllm.message_queue import LayerMessage, Message

# How long layers may be under way after vLLM has said that their request ended.
HANDOVER_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Ended:
    """vLLM is done with a request; `problem` says why it gave none. `cached_tokens`: found in its prefix cache."""

    tag: str
    problem: str | None
    cached_tokens: int = 0


class BatchProgress:
    """Emits layers and fails samples while the batch `runs`.

    Args:
        assembly: of the batch.
        emit, fail: of the batch's caller.
        abort: ends a row's request.
    """

    def __init__(self, assembly: Assembly, emit: Emit, fail: Fail, abort: Mapping[int, Callable[[], object]]) -> None:
        self._assembly, self._emit, self._fail, self._abort = assembly, emit, fail, abort
        self._started = time.perf_counter()
        self._prefill_s = 0.0
        self._encode_s: dict[int, float] = {}
        self._cached_tokens = 0
        self._reading = set(abort)
        self._due: dict[int, float] = {}

    @property
    def runs(self) -> bool:
        """Whether layers are still to come, or vLLM is still at a request: its last layer's K/V come before its end."""
        return bool(self._reading or self._assembly.open_rows())

    def give_up(self, wanted: Wanted) -> None:
        """Ends samples that nobody waits for, and those whose layers are overdue."""
        for row in self._assembly.open_rows():
            if not wanted(row):
                self._assembly.drop(row)
                self._abort[row]()
                self._reading.discard(row)
            elif time.perf_counter() > self._due.get(row, float("inf")):
                self._end(row, f"its keys and values were not complete {HANDOVER_SECONDS:.0f} s after vLLM had read it")

    def on_ended(self, event: Ended) -> None:
        """VLLM is done with a request; its layers may still be under way."""
        row = self._assembly.row_of(event.tag)
        if row is None:
            return
        self._reading.discard(row)
        self._prefill_s = time.perf_counter() - self._started
        self._cached_tokens += event.cached_tokens
        self._due[row] = time.perf_counter() + HANDOVER_SECONDS
        if event.problem is not None and self._assembly.is_open(row):
            self._end(row, event.problem)

    def on_message(self, message: Message) -> None:
        """What a worker sent."""
        if isinstance(message, LayerMessage):
            spent = self._encode_s.get(message.heads_from, 0.0)
            self._encode_s[message.heads_from] = spent + message.encode_s
            # As long as layers come, none is overdue.
            self._due = dict.fromkeys(self._due, time.perf_counter() + HANDOVER_SECONDS)
        results, failures = self._assembly.take(message)
        for result in results:
            self._emit(result)
        for failure in failures:
            self._fail(failure)

    def timings(self) -> ExecutionTimings:
        """What the batch took: until vLLM's last answer, and in the slowest of the ranks that encode side by side."""
        return ExecutionTimings(self._prefill_s, max(self._encode_s.values(), default=0.0), self._cached_tokens)

    def _end(self, row: int, problem: str) -> None:
        self._assembly.drop(row)
        self._fail(SampleFailure(row, problem))
