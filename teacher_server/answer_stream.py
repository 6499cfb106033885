"""One answer on its way out: results become frames, and frames wait here until the caller reads them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kvcore.monitoring import tracing
from kvcore.types import Sample, Timings
from kvcore.wire.completion import Completion
from kvcore.wire.frames import FrameWriter
from teacher_server.engines.base import LayerResult
from teacher_server.monitoring.request_tracing import add_batch
from teacher_server.sample_queue import Job


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A frame (or nothing), and how many bytes of the stream's window are free again once it was sent."""

    frame: bytes
    releases: int = 0


class AnswerStream:
    """The frames of one request. For the event loop's thread alone.

    Args:
        writer: makes the frames.
        samples: how many samples the request holds; the stream ends with the last one's end.
        count_sample: called with the status of every sample that ends.
    """

    def __init__(self, writer: FrameWriter, samples: int, count_sample: Callable[[str], None]) -> None:
        self._writer = writer
        self._remaining = samples
        self._count_sample = count_sample
        self._span = tracing.current()
        self._opened: set[int] = set()
        self._outbox: deque[Outgoing] = deque()
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._flush_planned = False
        self._ended = False
        self._crash: Exception | None = None

    async def next(self) -> Outgoing | None:
        """Waits for the next frame; None after the last one.

        Raises:
            Exception: whatever a callback raised; the stream cannot go on.
        """
        while not self._outbox:
            if self._crash is not None:
                raise self._crash
            if self._ended:
                return None
            self._changed.clear()
            await self._changed.wait()
        return self._outbox.popleft()

    def refuse(self, index: int, code: str, problem: str) -> None:
        """Ends a sample without its K/V."""
        self._remaining -= 1
        self._count_sample(code)
        self._put(self._writer.sample_failed(index, code, problem))

    def settle(self, releases: int = 0) -> None:
        """Sends what is buffered, and the end of the stream after its last sample."""
        if self._ended:
            return
        self._ended = not self._remaining
        self._put(self._writer.end() if self._ended else self._writer.flush(), releases)

    def announce(self, index: int, prompt: Sample, written: Completion) -> None:
        """Says what was written behind a prompt, before its K/V."""
        self._put(self._writer.completion(index, prompt, written))

    def on_layer(self, jobs: Sequence[Job], rows: Sequence[int], result: LayerResult) -> None:
        """Frames one layer of some samples."""
        for job in jobs:
            self._open(job)
        parts, positions = result.parts, result.positions
        if len(rows) != len(result.indices):
            index = torch.tensor(rows)
            parts = {name: part[index] for name, part in parts.items()}
            positions = positions[index]
        errors = {kind: [values[row] for row in rows] for kind, values in result.relative_error.items()}
        self._put(self._writer.layer_batch([job.index for job in jobs], result.layer, parts, positions, errors))
        self._flush_soon()

    def on_failed(self, job: Job, code: str, problem: str) -> None:
        """Ends one sample of a batch without its K/V."""
        self.refuse(job.index, code, problem)

    def on_batch_end(self, done: Sequence[Job], timings: Sequence[Timings], releases: int) -> None:
        """Ends the samples that are complete."""
        add_batch(self._span, done, timings)
        for job, spent in zip(done, timings, strict=True):
            self._put(self._writer.sample_end(job.index, spent))
            self._count_sample("ok")
        self._remaining -= len(done)
        self.settle(releases)

    def on_crash(self, error: Exception) -> None:
        """Ends the stream with an error once the frames before it are read."""
        self._crash = error
        self._changed.set()

    def _open(self, job: Job) -> None:
        if job.index not in self._opened:
            self._opened.add(job.index)
            tokens = job.planned.tokens
            self._put(self._writer.sample(job.index, tokens.sample.id, tokens.token_ids, tokens.byte_ends))

    def _flush_soon(self) -> None:
        """Flushes in the loop's next round: results that already wait for the loop share a frame with this one."""
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
        self._outbox.extend(outgoing)
        if outgoing or self._ended:
            self._changed.set()
