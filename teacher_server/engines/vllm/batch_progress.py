"""The progress of one batch in vLLM: turns events of its workers and its scheduler into layers and failures."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from teacher_server.engines.base import Emit, ExecutionTimings, Fail, SampleFailure, Wanted
from teacher_server.engines.vllm.assembly import Assembly
from teacher_server.engines.vllm.message_queue import LayerMessage, Message

# How long a request's layers may take to arrive after vLLM has finished the request.
HANDOVER_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Ended:
    """VLLM finished a request. `problem`: why it failed, or None. `cached_tokens`: found in the prefix cache."""

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
        self._running = set(abort)
        self._deadlines: dict[int, float] = {}

    @property
    def runs(self) -> bool:
        """Whether vLLM still runs a request of the batch, or layers are still to arrive."""
        return bool(self._running or self._assembly.open_rows())

    def give_up(self, wanted: Wanted) -> None:
        """Drop samples that are no longer wanted, and fail those whose layers are overdue."""
        for row in self._assembly.open_rows():
            if not wanted(row):
                self._assembly.drop(row)
                self._abort[row]()
                self._running.discard(row)
            elif time.perf_counter() > self._deadlines.get(row, float("inf")):
                self._end(
                    row, f"its keys and values were incomplete {HANDOVER_SECONDS:.0f} s after vLLM had finished it"
                )

    def on_ended(self, event: Ended) -> None:
        """Record that vLLM finished a request; its layers may still be on their way."""
        row = self._assembly.row_of(event.tag)
        if row is None:
            return
        self._running.discard(row)
        self._prefill_s = time.perf_counter() - self._started
        self._cached_tokens += event.cached_tokens
        self._deadlines[row] = time.perf_counter() + HANDOVER_SECONDS
        if event.problem is not None and self._assembly.is_open(row):
            self._end(row, event.problem)

    def on_message(self, message: Message) -> None:
        """Take a message of a worker."""
        if isinstance(message, LayerMessage):
            spent = self._encode_s.get(message.heads_from, 0.0)
            self._encode_s[message.heads_from] = spent + message.encode_s
            # While layers arrive, none is overdue.
            self._deadlines = dict.fromkeys(self._deadlines, time.perf_counter() + HANDOVER_SECONDS)
        results, failures = self._assembly.take(message)
        for result in results:
            self._emit(result)
        for failure in failures:
            self._fail(failure)

    def timings(self) -> ExecutionTimings:
        """Time until vLLM finished the last request, and encoding time of the slowest of the parallel ranks."""
        return ExecutionTimings(self._prefill_s, max(self._encode_s.values(), default=0.0), self._cached_tokens)

    def _end(self, row: int, problem: str) -> None:
        self._assembly.drop(row)
        self._fail(SampleFailure(row, problem))
