"""The answer to one request: turns results into frames, and holds the frames until they are sent."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvcore.monitoring import tracing
from kvcore.types import Sample, Timings
from kvcore.wire.completion import Completion
from kvcore.wire.frames import FrameWriter
from teacher_server.engines.base import LayerResult
from teacher_server.monitoring.request_tracing import add_batch
from teacher_server.sample_queue import Job


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A frame, possibly empty, and the bytes of the stream's window that are free once it is sent."""

    frame: bytes
    releases: int = 0


class AnswerStream:
    """The frames of one request. Used on the event loop's thread only.

    Args:
        writer: makes the frames.
        samples: number of samples in the request; the stream ends when the last one has ended.
        count_sample: called with the status of every sample that ends.
    """

    def __init__(self, writer: FrameWriter, samples: int, count_sample: Callable[[str], None]) -> None:
        self._writer = writer
        self._remaining = samples
        self._count_sample = count_sample
        self._span = tracing.current()
        self._opened: set[int] = set()
        self._outgoing: deque[Outgoing] = deque()
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._flush_planned = False
        self._ended = False
        self._crash: Exception | None = None

    async def next(self) -> Outgoing | None:
        """Wait for the next frame; returns None after the last one.

        Raises:
            Exception: a callback raised it; the stream cannot continue.
        """
        while not self._outgoing:
            if self._crash is not None:
                raise self._crash
            if self._ended:
                return None
            self._changed.clear()
            await self._changed.wait()
        return self._outgoing.popleft()

    def refuse(self, index: int, code: str, problem: str) -> None:
        """See `Sink.refuse`."""
        self._remaining -= 1
        self._count_sample(code)
        self._put(self._writer.sample_failed(index, code, problem))

    def settle(self, releases: int = 0) -> None:
        """Queue the buffered records for sending, and the end of the stream if the last sample has ended."""
        if self._ended:
            return
        self._ended = not self._remaining
        self._put(self._writer.end() if self._ended else self._writer.flush(), releases)

    def announce(self, index: int, prompt: Sample, completion: Completion) -> None:
        """Send the completion of a prompt; its K/V follow later."""
        self._put(self._writer.completion(index, prompt, completion))

    def on_layer(self, jobs: Sequence[Job], rows: Sequence[int], result: LayerResult) -> None:
        """See `Sink.on_layer`."""
        for job in jobs:
            self._open(job)
        own = result.subset(rows)
        indices = [job.index for job in jobs]
        self._put(
            self._writer.layer_batch(
                indices, own.layer, own.parts, own.positions, own.relative_error, packed=own.packed or None
            )
        )
        self._flush_soon()

    def on_batch_end(self, done: Sequence[Job], timings: Sequence[Timings], releases: int) -> None:
        """See `Sink.on_batch_end`."""
        add_batch(self._span, done, timings)
        for job, spent in zip(done, timings, strict=True):
            self._put(self._writer.sample_end(job.index, spent))
            self._count_sample("ok")
        self._remaining -= len(done)
        self.settle(releases)

    def on_crash(self, error: Exception) -> None:
        """End the stream with an error after the frames that already wait."""
        self._crash = error
        self._changed.set()

    def _open(self, job: Job) -> None:
        if job.index not in self._opened:
            self._opened.add(job.index)
            tokens = job.planned.tokens
            self._put(self._writer.sample(job.index, tokens.sample.id, tokens.token_ids, tokens.byte_ends))

    def _flush_soon(self) -> None:
        """Flush in the loop's next iteration, so that results that already wait for the loop share a frame."""
        if not self._flush_planned:
            self._flush_planned = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_planned = False
        self._put(self._writer.flush())

    def _put(self, frames: Sequence[bytes], releases: int = 0) -> None:
        outgoing = [Outgoing(frame) for frame in frames]
        if releases:
            last = outgoing.pop().frame if outgoing else b""
            outgoing.append(Outgoing(last, releases))
        self._outgoing.extend(outgoing)
        if outgoing or self._ended:
            self._changed.set()
