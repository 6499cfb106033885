"""The queue of samples for the engine: bounded, fair between streams, batched by padded tokens.

A stream's samples are `pending` until its window has room for their answers, then `ready` for the engine, in the
stream's order. Batches take ready samples of all streams in rotation. All methods may be called from any thread.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvcore.errors import KVDistillError
from kvcore.plan import SamplingParams
from kvcore.types import Timings
from teacher_server.engines.base import GeneratedText, LayerResult, PlannedSample, SampleFailure

MIN_RETRY_MS, MAX_RETRY_MS, UNMEASURED_RETRY_MS = 50, 10_000, 1000


class BusyError(KVDistillError):
    """The server is at its limit; the same request can succeed after `retry_ms`."""

    def __init__(self, problem: str, retry_ms: int) -> None:
        super().__init__(problem)
        self.retry_ms = retry_ms


class Sink(Protocol):
    """Receives the results of a stream's samples, on the event loop's thread."""

    def on_layer(self, jobs: Sequence[Job], rows: Sequence[int], result: LayerResult) -> None:
        """One layer of some samples is encoded: job i is row `rows[i]` of the result's tensors."""
        ...

    def refuse(self, index: int, code: str, problem: str) -> None:
        """The sample at this index of the request failed; `code` is the name of a gRPC status."""
        ...

    def on_batch_end(self, done: Sequence[Job], timings: Sequence[Timings], releases: int) -> None:
        """A batch left the engine: the samples that are complete, and the window bytes that the batch releases."""
        ...

    def on_crash(self, error: Exception) -> None:
        """A call to this sink raised an exception."""
        ...


# Receives prompts, their outcomes in the same order, and the seconds that their batch took.
OnGenerated = Callable[[Sequence["Job"], Sequence[GeneratedText | SampleFailure], float], None]


@dataclass(slots=True, eq=False)
class ClientStream:
    """One stream's samples in the queue.

    `on_generated`: receives the generated texts if the samples are prompts, on the event loop's thread. `unsent`: bytes
    of answers that are computed or being computed, and not sent yet. `gone`: the stream has ended.
    """

    sink: Sink
    on_generated: OnGenerated | None = None
    pending: deque[Job] = field(default_factory=deque)
    ready: deque[Job] = field(default_factory=deque)
    unsent: int = 0
    gone: bool = False


@dataclass(slots=True, eq=False)
class Job:
    """One sample of a stream.

    `index`: in the request. `nbytes`: size of its answer. `sampling`: for a prompt, how to generate from it; None for a
    sample whose K/V are asked for. Only jobs with equal `sampling` share a batch. `ready_at`: on the clock of
    `time.perf_counter`. `waited`: seconds from ready to running.
    """

    stream: ClientStream
    index: int
    planned: PlannedSample
    nbytes: int
    sampling: SamplingParams | None = None
    ready_at: float = 0.0
    waited: float = 0.0
    failed: bool = False

    @property
    def tokens(self) -> int:
        """Tokens without padding; for a prompt, `max_new_tokens` are added."""
        return len(self.planned.tokens.token_ids) + (self.sampling.max_new_tokens if self.sampling else 0)


class SampleQueue:
    """The waiting samples of all streams.

    Args:
        max_tokens: limit of the tokens that are ready or running.
        max_batch_tokens: limit of a batch's padded tokens; a single sample may exceed it.
        window_bytes: limit of a stream's unsent bytes; a single sample may exceed it.
    """

    def __init__(self, max_tokens: int, max_batch_tokens: int, window_bytes: int) -> None:
        self._max_tokens = max_tokens
        self._max_batch_tokens = max_batch_tokens
        self._window_bytes = window_bytes
        self._changed = threading.Condition()
        self._waiting: deque[ClientStream] = deque()
        self._rotation: deque[ClientStream] = deque()
        self._tokens = 0
        self._ready = 0
        self._tokens_per_second = 0.0
        self._closed = False

    @property
    def tokens(self) -> int:
        """Tokens that are ready or running."""
        return self._tokens

    @property
    def ready_samples(self) -> int:
        """Samples that are ready for the engine."""
        return self._ready

    def admit(self, stream: ClientStream, jobs: Sequence[Job]) -> None:
        """Queue a stream's samples, all or none. An idle server accepts a request of any size.

        Raises:
            BusyError: the queue has no room for them.
        """
        total = sum(job.tokens for job in jobs)
        with self._changed:
            if self._tokens and self._tokens + total > self._max_tokens:
                raise self._busy(total)
            stream.pending.extend(jobs)
            self._waiting.append(stream)
            self._refill()

    def extend(self, stream: ClientStream, jobs: Sequence[Job]) -> None:
        """Queue samples that follow from admitted ones: they wait for room and are never refused."""
        with self._changed:
            if stream.gone or not jobs:
                return
            if not stream.pending:
                self._waiting.append(stream)
            stream.pending.extend(jobs)
            self._refill()

    def take(self) -> list[Job]:
        """Wait for the next batch; returns an empty list when the queue is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._rotation or self._closed)
            if self._closed:
                return []
            batch = self._next_batch()
            self._ready -= len(batch)
        now = time.perf_counter()
        for job in batch:
            job.waited = now - job.ready_at
        return batch

    def done(self, batch: Sequence[Job], seconds: float) -> None:
        """Record that a batch left the engine after `seconds`."""
        tokens = sum(job.tokens for job in batch)
        with self._changed:
            self._tokens -= tokens
            rate = tokens / max(seconds, 1e-6)
            self._tokens_per_second = rate if not self._tokens_per_second else (self._tokens_per_second + rate) / 2
            self._refill()

    def release(self, stream: ClientStream, nbytes: int) -> None:
        """Record that `nbytes` of a stream's answers were sent."""
        with self._changed:
            stream.unsent -= nbytes
            self._refill()

    def remove(self, stream: ClientStream) -> None:
        """Remove a stream and its waiting samples; results of its running samples are discarded."""
        with self._changed:
            stream.gone = True
            self._tokens -= sum(job.tokens for job in stream.ready)
            self._ready -= len(stream.ready)
            stream.pending.clear()
            stream.ready.clear()
            for group in (self._waiting, self._rotation):
                if stream in group:
                    group.remove(stream)
            self._refill()

    def close(self) -> None:
        """Close the queue and wake the thread that waits in `take`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _busy(self, added: int) -> BusyError:
        excess = self._tokens + added - self._max_tokens
        estimate = 1000 * excess / self._tokens_per_second if self._tokens_per_second else UNMEASURED_RETRY_MS
        return BusyError(
            f"{self._tokens} tokens are queued and this request adds {added}; the limit is {self._max_tokens}",
            int(min(max(estimate, MIN_RETRY_MS), MAX_RETRY_MS)),
        )

    def _refill(self) -> None:
        """Make pending samples ready, one of each stream in turn, until no window or limit has room."""
        blocked = 0
        while blocked < len(self._waiting):
            stream = self._waiting.popleft()
            blocked = 0 if self._make_ready(stream) else blocked + 1
            if stream.pending:
                self._waiting.append(stream)
        if self._rotation:
            self._changed.notify()

    def _make_ready(self, stream: ClientStream) -> bool:
        job = stream.pending[0]
        if stream.unsent and stream.unsent + job.nbytes > self._window_bytes:
            return False
        if self._tokens and self._tokens + job.tokens > self._max_tokens:
            return False
        stream.unsent += job.nbytes
        self._tokens += job.tokens
        self._ready += 1
        job.ready_at = time.perf_counter()
        if not stream.ready:
            self._rotation.append(stream)
        stream.ready.append(stream.pending.popleft())
        return True

    def _next_batch(self) -> list[Job]:
        batch: list[Job] = []
        skipped: list[ClientStream] = []
        longest = 0
        sampling = self._rotation[0].ready[0].sampling
        while self._rotation:
            stream = self._rotation[0]
            if stream.ready[0].sampling != sampling:
                skipped.append(self._rotation.popleft())
                continue
            longest = max(longest, stream.ready[0].tokens)
            if batch and longest * (len(batch) + 1) > self._max_batch_tokens:
                break
            batch.append(stream.ready.popleft())
            self._rotation.rotate(-1)
            if not stream.ready:
                self._rotation.pop()
        # Streams that were skipped come first in the next batch.
        self._rotation.extendleft(reversed(skipped))
        return batch
