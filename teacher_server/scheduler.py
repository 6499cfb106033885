"""Runs the engine in one thread on batches of all callers' samples, and hands results to the event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial

from kvcore.types import Timings
from teacher_server.engines.base import (
    ExecutionTimings,
    GeneratedText,
    GenerateOptions,
    LayerResult,
    SampleFailure,
    TeacherEngine,
)
from teacher_server.monitoring.logs import log_event
from teacher_server.monitoring.metrics import Metrics
from teacher_server.sample_queue import ClientStream, Job, SampleQueue

log = logging.getLogger(__name__)


class Scheduler:
    """The engine's thread and what feeds it. Made, and told of requests, on the event loop's thread.

    Args:
        engine: called from this scheduler's thread alone.
        queue: what waits for the engine.
        metrics: of the server.
        on_engine_error: called on the event loop with what the engine raised on a batch.
    """

    def __init__(
        self, engine: TeacherEngine, queue: SampleQueue, metrics: Metrics, on_engine_error: Callable[[Exception], None]
    ) -> None:
        self.queue = queue
        self._engine = engine
        self._metrics = metrics
        self._on_engine_error = on_engine_error
        self._loop = asyncio.get_running_loop()
        # A daemon: a model that hangs must not keep a process alive that was told to end.
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float) -> bool:
        """Ends the engine's thread; False if a batch still runs after `timeout_s`."""
        self.queue.close()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while batch := self.queue.take():
            self._run(batch)

    def _run(self, batch: list[Job]) -> None:
        started = time.perf_counter()
        options = batch[0].options
        try:
            finish = self._read(batch) if options is None else self._write(batch, options)
        except Exception as error:  # noqa: BLE001  a model and its libraries raise anything; the server stays up
            finish = partial(self._fail_batch, batch, error)
        self.queue.done(batch, time.perf_counter() - started)
        self._post(finish)

    def _read(self, batch: list[Job]) -> Callable[[], None]:
        timings = self._engine.run(
            [job.planned for job in batch],
            lambda result: self._post(self._hand_over, batch, result),
            lambda failure: self._post(self._fail_one, batch, failure),
            lambda row: not batch[row].lane.gone,
        )
        return partial(self._finish, batch, timings)

    def _write(self, batch: list[Job], options: GenerateOptions) -> Callable[[], None]:
        started = time.perf_counter()
        outcomes = self._engine.generate(
            [job.planned.tokens for job in batch], options, lambda row: not batch[row].lane.gone
        )
        assert len(outcomes) == len(batch)
        return partial(self._finish_writing, batch, outcomes, time.perf_counter() - started)

    def _post(self, callback: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:
            log.warning("results of a batch came after the server had ended")

    def _hand_over(self, batch: list[Job], result: LayerResult) -> None:
        by_lane: dict[ClientStream, tuple[list[Job], list[int]]] = {}
        for row, index in enumerate(result.indices):
            jobs, rows = by_lane.setdefault(batch[index].lane, ([], []))
            jobs.append(batch[index])
            rows.append(row)
        for lane, (jobs, rows) in by_lane.items():
            _tell(lane, lane.sink.on_layer, jobs, rows, result)

    def _fail_one(self, batch: list[Job], failure: SampleFailure) -> None:
        job = batch[failure.index]
        job.failed = True
        _tell(job.lane, job.lane.sink.on_failed, job, "FAILED_PRECONDITION", failure.problem)

    def _finish(self, batch: list[Job], timings: ExecutionTimings) -> None:
        self._observe(batch, timings)
        for lane, jobs in _by_stream(batch).items():
            done = [job for job in jobs if not job.failed]
            spent = [Timings(job.waited, timings.prefill_s, timings.encode_s) for job in done]
            _tell(lane, lane.sink.on_batch_end, done, spent, sum(job.nbytes for job in jobs))

    def _finish_writing(
        self, batch: list[Job], outcomes: Sequence[GeneratedText | SampleFailure], seconds: float
    ) -> None:
        self._observe_writing(batch, outcomes, seconds)
        of_job = dict(zip(batch, outcomes, strict=True))
        for lane, jobs in _by_stream(batch).items():
            assert lane.on_written is not None
            _tell(lane, lane.on_written, jobs, [of_job[job] for job in jobs], seconds)

    def _fail_batch(self, batch: list[Job], error: Exception) -> None:
        error_id = uuid.uuid4().hex[:12]
        self._metrics.engine_errors.inc()
        tokens = sum(job.tokens for job in batch)
        log_event(
            log, "engine_failed", level=logging.ERROR, error=error, error_id=error_id, samples=len(batch), tokens=tokens
        )
        for lane, jobs in _by_stream(batch).items():
            for job in jobs:
                if not job.failed:
                    problem = f"the engine failed on this sample's batch (error {error_id})"
                    _tell(lane, lane.sink.on_failed, job, "INTERNAL", problem)
            _tell(lane, lane.sink.on_batch_end, [], [], sum(job.nbytes for job in jobs))
        self._on_engine_error(error)

    def _observe(self, batch: Sequence[Job], timings: ExecutionTimings) -> None:
        metrics = self._metrics
        tokens = sum(job.tokens for job in batch)
        metrics.tokens.inc(tokens)
        metrics.cached_tokens.inc(timings.cached_tokens)
        metrics.batch_tokens.observe(tokens)
        metrics.batch_samples.observe(len(batch))
        metrics.model_seconds.inc(timings.prefill_s)
        metrics.encode_seconds.inc(timings.encode_s)
        for job in batch:
            metrics.queue_wait.observe(job.waited)

    def _observe_writing(
        self, batch: Sequence[Job], outcomes: Sequence[GeneratedText | SampleFailure], seconds: float
    ) -> None:
        metrics = self._metrics
        written = sum(outcome.tokens for outcome in outcomes if isinstance(outcome, GeneratedText))
        metrics.tokens.inc(sum(len(job.planned.tokens.token_ids) for job in batch) + written)
        metrics.written_tokens.inc(written)
        metrics.writing_seconds.inc(seconds)
        for job in batch:
            metrics.queue_wait.observe(job.waited)


def _by_stream(batch: Sequence[Job]) -> dict[ClientStream, list[Job]]:
    lanes: dict[ClientStream, list[Job]] = {}
    for job in batch:
        lanes.setdefault(job.lane, []).append(job)
    return lanes


def _tell(lane: ClientStream, callback: Callable[..., None], *arguments: object) -> None:
    """Calls a stream back unless it is gone; what goes wrong there ends that stream alone."""
    if lane.gone:
        return
    try:
        callback(*arguments)
    except Exception as error:  # noqa: BLE001  the event loop would swallow it and leave the caller waiting
        lane.sink.on_crash(error)
