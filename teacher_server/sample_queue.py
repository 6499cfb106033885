"""The samples that wait for the engine: one bounded queue, fair between streams, batched by padded tokens.

A stream's samples are `pending` until its window has room for their answers, then `ready` for the engine, in its own
order. Ready samples of all streams are taken in rotation. All methods may be called from any thread.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvcore.errors import KVDistillError
from kvcore.types import Timings
from teacher_server.engines.base import GeneratedText, GenerateOptions, LayerResult, PlannedSample, SampleFailure

MIN_RETRY_MS, MAX_RETRY_MS, UNMEASURED_RETRY_MS = 50, 10_000, 1000


class BusyError(KVDistillError):
    """The server takes no more at the moment; the same request can succeed after `retry_ms`."""

    def __init__(self, problem: str, retry_ms: int) -> None:
        super().__init__(problem)
        self.retry_ms = retry_ms


class Sink(Protocol):
    """Who receives the results of a stream's samples, on the event loop's thread."""

    def on_layer(self, jobs: Sequence[Job], rows: Sequence[int], result: LayerResult) -> None:
        """One layer of some samples: job i is row `rows[i]` of the result's tensors."""
        ...

    def on_failed(self, job: Job, code: str, problem: str) -> None:
        """A sample that ends without its K/V."""
        ...

    def on_batch_end(self, done: Sequence[Job], timings: Sequence[Timings], releases: int) -> None:
        """A batch left the engine: samples whose layers were all handed over, and the window bytes of the batch."""
        ...

    def on_crash(self, error: Exception) -> None:
        """A call to this sink raised."""
        ...


# What came of some prompts, in their order, and the seconds that their batch took.
OnWritten = Callable[[Sequence["Job"], Sequence[GeneratedText | SampleFailure], float], None]


@dataclass(slots=True, eq=False)
class ClientStream:
    """One stream's place in the queue.

    `on_written`: who receives what was written behind its samples, on the event loop's thread, where they are prompts.
    `unsent`: bytes of answers that were asked of the engine and not yet sent.
    """

    sink: Sink
    on_written: OnWritten | None = None
    pending: deque[Job] = field(default_factory=deque)
    ready: deque[Job] = field(default_factory=deque)
    unsent: int = 0
    gone: bool = False


@dataclass(slots=True, eq=False)
class Job:
    """One sample on its way through the server.

    `index`: its place in the request. `nbytes`: its answer's size. `options`: how to write on from it; None where its
    K/V are wanted. Only jobs with equal options share a batch.
    """

    lane: ClientStream
    index: int
    planned: PlannedSample
    nbytes: int
    options: GenerateOptions | None = None
    ready_at: float = 0.0
    waited: float = 0.0
    failed: bool = False

    @property
    def tokens(self) -> int:
        """T, without padding; with those that may be written."""
        return len(self.planned.tokens.token_ids) + (self.options.max_new_tokens if self.options else 0)


class SampleQueue:
    """Waiting samples of all streams.

    Args:
        max_tokens: the most tokens that are ready or running.
        max_batch_tokens: the most padded tokens of a batch; a single sample may pass it.
        window_bytes: the most unsent bytes of a stream; a single sample may pass it.
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
        """Tokens ready or running."""
        return self._tokens

    @property
    def ready_samples(self) -> int:
        """Samples that wait for the engine alone."""
        return self._ready

    def admit(self, lane: ClientStream, jobs: Sequence[Job]) -> None:
        """Takes a stream's samples, all or none. An idle server takes a request of any size.

        Raises:
            BusyError: they do not fit at the moment.
        """
        total = sum(job.tokens for job in jobs)
        with self._changed:
            if self._tokens and self._tokens + total > self._max_tokens:
                raise self._busy(total)
            lane.pending.extend(jobs)
            self._waiting.append(lane)
            self._refill()

    def extend(self, lane: ClientStream, jobs: Sequence[Job]) -> None:
        """Takes what follows from samples that were admitted: it waits for room, and is never refused."""
        with self._changed:
            if lane.gone or not jobs:
                return
            if not lane.pending:
                self._waiting.append(lane)
            lane.pending.extend(jobs)
            self._refill()

    def take(self) -> list[Job]:
        """Blocks for the next batch; empty once the queue is closed."""
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
        """Says that a batch left the engine after `seconds`."""
        tokens = sum(job.tokens for job in batch)
        with self._changed:
            self._tokens -= tokens
            rate = tokens / max(seconds, 1e-6)
            self._tokens_per_second = rate if not self._tokens_per_second else (self._tokens_per_second + rate) / 2
            self._refill()

    def release(self, lane: ClientStream, nbytes: int) -> None:
        """Says that a stream's answers of this size were sent."""
        with self._changed:
            lane.unsent -= nbytes
            self._refill()

    def remove(self, lane: ClientStream) -> None:
        """Forgets a stream: its waiting samples leave, and those that run have no receiver any more."""
        with self._changed:
            lane.gone = True
            self._tokens -= sum(job.tokens for job in lane.ready)
            self._ready -= len(lane.ready)
            lane.pending.clear()
            lane.ready.clear()
            for group in (self._waiting, self._rotation):
                if lane in group:
                    group.remove(lane)
            self._refill()

    def close(self) -> None:
        """Wakes the taker for the last time."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _busy(self, wanted: int) -> BusyError:
        excess = self._tokens + wanted - self._max_tokens
        estimate = 1000 * excess / self._tokens_per_second if self._tokens_per_second else UNMEASURED_RETRY_MS
        return BusyError(
            f"{self._tokens} tokens are queued and this request brings {wanted}; the limit is {self._max_tokens}",
            int(min(max(estimate, MIN_RETRY_MS), MAX_RETRY_MS)),
        )

    def _refill(self) -> None:
        """Makes pending samples ready, one of each stream in turn, until no window or limit has room."""
        stuck = 0
        while stuck < len(self._waiting):
            lane = self._waiting.popleft()
            stuck = 0 if self._make_ready(lane) else stuck + 1
            if lane.pending:
                self._waiting.append(lane)
        if self._rotation:
            self._changed.notify()

    def _make_ready(self, lane: ClientStream) -> bool:
        job = lane.pending[0]
        if lane.unsent and lane.unsent + job.nbytes > self._window_bytes:
            return False
        if self._tokens and self._tokens + job.tokens > self._max_tokens:
            return False
        lane.unsent += job.nbytes
        self._tokens += job.tokens
        self._ready += 1
        job.ready_at = time.perf_counter()
        if not lane.ready:
            self._rotation.append(lane)
        lane.ready.append(lane.pending.popleft())
        return True

    def _next_batch(self) -> list[Job]:
        batch: list[Job] = []
        passed_over: list[ClientStream] = []
        longest = 0
        options = self._rotation[0].ready[0].options
        while self._rotation:
            lane = self._rotation[0]
            if lane.ready[0].options != options:
                passed_over.append(self._rotation.popleft())
                continue
            longest = max(longest, lane.ready[0].tokens)
            if batch and longest * (len(batch) + 1) > self._max_batch_tokens:
                break
            batch.append(lane.ready.popleft())
            self._rotation.rotate(-1)
            if not lane.ready:
                self._rotation.pop()
        # Whoever could not come along is the first of the next batch.
        self._rotation.extendleft(reversed(passed_over))
        return batch
