"""The queue of samples for the engine: bounded, fair between callers, batched by padded tokens.

A request first reserves room for its estimated tokens. A stream's samples are `pending` until its window has room for
their answers, then `ready` for the engine, in the stream's order. The callers take turns by tokens, and a caller's
streams take turns too: each batch has the oldest ready sample of the stream whose turn it is, so none waits forever.
For an engine that pads, the batch is filled with ready samples that are near to that one in length, first with those of
the same caller; otherwise with those of all callers in turn. All methods may be called from any thread.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Protocol, Self

from kvcore.errors import KVDistillError
from kvcore.plan import SamplingParams
from kvcore.types import Timings
from teacher_server.batch_lengths import similar_lengths
from teacher_server.claims import Claims
from teacher_server.engines.base import GeneratedText, LayerResult, PlannedSample, SampleFailure
from teacher_server.fair_share import THE_SERVER, Caller, FairShare

# A stream may fill its window up to the free bytes divided by this.
STREAMS_PER_FREE_BYTES = 8
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

    `caller`: whose turns it uses. `on_generated`: receives the generated texts if the samples are prompts, on the event
    loop's thread. `unsent`: bytes of answers that are computed or being computed, and not sent yet. `gone`: the stream
    has ended.
    """

    sink: Sink
    on_generated: OnGenerated | None = None
    caller: Caller = THE_SERVER
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


@dataclass(slots=True, eq=False)
class Reservation:
    """Room for a request's tokens until its samples are in the queue. Leaving the block releases it.

    `nbytes`: size of the request. `tokens`: as estimated. `since`: when the request was refused first, or now.
    """

    queue: SampleQueue
    caller: Caller
    nbytes: int
    tokens: int
    since: float

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.queue.resize(self, 0)

    def add(self, tokens: int) -> None:
        """Reserve room for more tokens.

        Raises:
            BusyError: the queue has no room for them.
        """
        self.queue.resize(self, self.tokens + tokens)


class SampleQueue:
    """The waiting samples of all streams.

    Args:
        max_tokens: limit of the tokens that are reserved, ready or running.
        max_batch_tokens: limit of a batch's padded tokens; a single sample may exceed it.
        window_bytes: limit of a stream's unsent bytes; a single sample may exceed it.
        max_unsent_bytes: limit of the unsent bytes of all streams; a single sample may exceed it. The fewer are left,
            the smaller are the windows, so that slow readers leave room for others.
        small_batch_tokens: of the engine.
    """

    def __init__(
        self,
        max_tokens: int,
        max_batch_tokens: int,
        window_bytes: int,
        max_unsent_bytes: int,
        small_batch_tokens: int | None,
    ) -> None:
        self._max_tokens = max_tokens
        self._max_batch_tokens = max_batch_tokens
        self._small_batch_tokens = small_batch_tokens
        self._window_bytes = window_bytes
        self._max_unsent_bytes = max_unsent_bytes
        self._changed = threading.Condition()
        self._claims = Claims()
        # Streams with pending samples, and those with ready samples; the one that waits longest is first.
        self._waiting: deque[ClientStream] = deque()
        self._rotation: deque[ClientStream] = deque()
        self._made_ready, self._ran = FairShare(), FairShare()
        self._reserved = 0
        self._tokens = 0
        self._unsent = 0
        self._ready = 0
        self._running = 0
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

    def reserve(self, caller: Caller, nbytes: int, tokens: int) -> Reservation:
        """Reserve room for a request. An idle server accepts a request of any size.

        Args:
            caller: who asks.
            nbytes: size of the request, by which its repetition is recognised.
            tokens: of all its samples, as estimated.

        Raises:
            BusyError: the queue has no room for them.
        """
        with self._changed:
            reservation = Reservation(self, caller, nbytes, 0, self._claims.since((caller, nbytes)))
        self.resize(reservation, tokens)
        return reservation

    def resize(self, reservation: Reservation, tokens: int) -> None:
        """Change the tokens of a reservation.

        Raises:
            BusyError: the queue has no room for more.
        """
        added, key = tokens - reservation.tokens, (reservation.caller, reservation.nbytes)
        with self._changed:
            if added > 0:
                self._check_room(reservation, tokens)
                self._claims.settle(key, added)
            self._reserved += added
            reservation.tokens = tokens
            if added < 0:
                self._refill()

    def extend(self, stream: ClientStream, jobs: Sequence[Job]) -> None:
        """Queue samples of an admitted request: they wait for room and are never refused."""
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
            self._running += 1
        now = time.perf_counter()
        for job in batch:
            job.waited = now - job.ready_at
        return batch

    def done(self, batch: Sequence[Job], seconds: float) -> None:
        """Record that a batch that was taken left the engine after `seconds`."""
        tokens = sum(job.tokens for job in batch)
        with self._changed:
            self._tokens -= tokens
            # Batches that run at the same time share the engine.
            rate = tokens * self._running / max(seconds, 1e-6)
            self._running -= 1
            self._tokens_per_second = rate if not self._tokens_per_second else (self._tokens_per_second + rate) / 2
            self._refill()

    def release(self, stream: ClientStream, nbytes: int) -> None:
        """Record that `nbytes` of a stream's answers were sent."""
        with self._changed:
            if not stream.gone:
                stream.unsent -= nbytes
                self._unsent -= nbytes
                self._refill()

    def remove(self, stream: ClientStream) -> None:
        """Remove a stream and its waiting samples; results of its running samples are discarded."""
        with self._changed:
            stream.gone = True
            self._unsent -= stream.unsent
            self._tokens -= sum(job.tokens for job in stream.ready)
            self._ready -= len(stream.ready)
            stream.unsent = 0
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

    def _check_room(self, reservation: Reservation, tokens: int) -> None:
        key, since = (reservation.caller, reservation.nbytes), reservation.since
        queued = self._tokens + self._reserved - reservation.tokens
        claimed = self._claims.ahead_of(key, since)
        excess = queued + claimed + tokens - self._max_tokens
        if not queued + claimed or excess <= 0:
            return
        estimate = 1000 * excess / self._tokens_per_second if self._tokens_per_second else UNMEASURED_RETRY_MS
        retry_ms = int(min(max(estimate, MIN_RETRY_MS), MAX_RETRY_MS))
        self._claims.add(key, since, tokens, retry_ms)
        first = f", {claimed} are kept for requests that were refused before" if claimed else ""
        raise BusyError(
            f"{queued} tokens are queued{first} and this request adds about {tokens}; the limit is {self._max_tokens}",
            retry_ms,
        )

    def _refill(self) -> None:
        """Make pending samples ready, callers in turn, while the windows and the limit of tokens have room."""
        open_windows = deque(stream for stream in self._waiting if self._fits_window(stream))
        while open_windows:
            stream = self._pop_next(open_windows, self._made_ready)
            if not self._fits_window(stream):
                continue
            job = stream.pending[0]
            # Nobody overtakes, so that a large sample does not wait forever.
            if self._tokens and self._tokens + job.tokens > self._max_tokens:
                break
            self._make_ready(stream)
            self._made_ready.charge(stream.caller, job.tokens)
            self._waiting.remove(stream)
            if stream.pending:
                self._waiting.append(stream)
                open_windows.append(stream)
        if self._rotation:
            self._changed.notify_all()

    def _fits_window(self, stream: ClientStream) -> bool:
        nbytes, free = stream.pending[0].nbytes, self._max_unsent_bytes - self._unsent
        if not self._unsent:
            return True
        if not stream.unsent:
            return nbytes <= free
        return stream.unsent + nbytes <= min(self._window_bytes, free // STREAMS_PER_FREE_BYTES)

    def _make_ready(self, stream: ClientStream) -> None:
        job = stream.pending.popleft()
        stream.unsent += job.nbytes
        self._unsent += job.nbytes
        self._tokens += job.tokens
        self._ready += 1
        job.ready_at = time.perf_counter()
        if not stream.ready:
            self._rotation.append(stream)
        stream.ready.append(job)

    def _next_batch(self) -> list[Job]:
        caller = self._ran.next({stream.caller: 0.0 for stream in self._rotation})
        head = next(stream for stream in self._rotation if stream.caller == caller)
        # Generation takes a pass per new token, so a second batch costs more than the padding of its prompts.
        if self._small_batch_tokens is None or head.ready[0].sampling is not None:
            return self._batch_in_turn(head.ready[0].sampling)
        return self._batch_by_length(head, self._small_batch_tokens)

    def _batch_by_length(self, head: ClientStream, small_batch_tokens: int) -> list[Job]:
        self._rotation.remove(head)
        self._rotation.appendleft(head)
        waiting = [stream for stream in self._rotation if stream.ready[0].sampling is None]
        own = _in_turn(stream for stream in waiting if stream.caller == head.caller)
        all_jobs = own + _in_turn(stream for stream in waiting if stream.caller != head.caller)
        lengths = [job.tokens for job in all_jobs]
        batch = [
            all_jobs[place] for place in similar_lengths(lengths, self._max_batch_tokens, small_batch_tokens, len(own))
        ]
        taken = set(batch)
        for stream in {job.stream for job in batch}:
            stream.ready = deque(job for job in stream.ready if job not in taken)
        for job in batch:
            self._ran.charge(job.stream.caller, job.tokens)
        self._rotation.rotate(-1)
        self._rotation = deque(stream for stream in self._rotation if stream.ready)
        return batch

    def _batch_in_turn(self, sampling: SamplingParams | None) -> list[Job]:
        batch: list[Job] = []
        longest = 0
        waiting = deque(stream for stream in self._rotation if stream.ready[0].sampling == sampling)
        while waiting:
            stream = self._pop_next(waiting, self._ran)
            longest = max(longest, stream.ready[0].tokens)
            if batch and longest * (len(batch) + 1) > self._max_batch_tokens:
                break
            batch.append(stream.ready.popleft())
            self._ran.charge(stream.caller, batch[-1].tokens)
            self._rotation.remove(stream)
            if stream.ready:
                self._rotation.append(stream)
                waiting.append(stream)
        return batch

    def _pop_next(self, streams: deque[ClientStream], share: FairShare) -> ClientStream:
        """Remove and return the first stream of the caller whose turn it is."""
        caller = share.next({stream.caller: 0.0 for stream in streams})
        chosen = next(stream for stream in streams if stream.caller == caller)
        streams.remove(chosen)
        return chosen


def _in_turn(streams: Iterable[ClientStream]) -> list[Job]:
    """The ready samples of several streams: the oldest of each, then the second of each, and so on."""
    turns = zip_longest(*(stream.ready for stream in streams))
    return [job for turn in turns for job in turn if job is not None]
