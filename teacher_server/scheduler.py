"""The scheduler: runs batches of all callers' samples in the engine's threads; results go to the event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial

from kvcore.plan import CODED, SamplingParams
from kvcore.types import Timings
from kvcore.wire.packed_rows import pack_rows
from teacher_server.batch_lengths import padding
from teacher_server.engines.base import ExecutionTimings, GeneratedText, LayerResult, SampleFailure, TeacherEngine
from teacher_server.monitoring.logs import log_event
from teacher_server.monitoring.metrics import Metrics
from teacher_server.result_cache import CachedRuns
from teacher_server.sample_queue import ClientStream, Job, SampleQueue

log = logging.getLogger(__name__)


class Scheduler:
    """The engine's threads, one for each concurrent batch. Create it on the event loop's thread; callbacks run there.

    Args:
        engine: `run` and `generate` are called from this scheduler's threads only.
        queue: where batches come from.
        metrics: of the server.
        on_engine_error: called on the event loop with what the engine raised on a batch.
        cache_bytes: memory for the results of recent samples; 0 keeps none.
    """

    def __init__(
        self,
        engine: TeacherEngine,
        queue: SampleQueue,
        metrics: Metrics,
        on_engine_error: Callable[[Exception], None],
        cache_bytes: int = 0,
    ) -> None:
        self.queue = queue
        self._engine = engine
        self._runs = CachedRuns(engine, cache_bytes, metrics)
        self._metrics = metrics
        self._on_engine_error = on_engine_error
        self._loop = asyncio.get_running_loop()
        # Entropy coding takes too long for the event loop, and the engine's threads have the next layer to compute.
        self._packer = ThreadPoolExecutor(1, thread_name_prefix="packing")
        # Daemon threads: a model that hangs must not keep a stopping process alive.
        self._threads = [
            threading.Thread(target=self._work, name="engine", daemon=True) for _ in range(engine.concurrent_batches)
        ]
        for thread in self._threads:
            thread.start()

    def close(self, timeout_s: float) -> bool:
        """End the engine's threads; returns False if a batch still runs after `timeout_s`."""
        self.queue.close()
        give_up_at = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, give_up_at - time.monotonic()))
        self._packer.shutdown(wait=False)
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        while batch := self.queue.take():
            self._run(batch)

    def _run(self, batch: list[Job]) -> None:
        started = time.perf_counter()
        sampling = batch[0].sampling
        try:
            finish = self._prefill(batch) if sampling is None else self._generate(batch, sampling)
        except Exception as error:  # noqa: BLE001  a model and its libraries raise anything; the server stays up
            finish = partial(self._fail_batch, batch, error)
        self.queue.done(batch, time.perf_counter() - started)
        self._post(finish)

    def _prefill(self, batch: list[Job]) -> Callable[[], None]:
        packing: list[Future[None]] = []

        def emit(result: LayerResult) -> None:
            if batch[result.indices[0]].planned.plan.codec.name == CODED:
                packing.append(self._packer.submit(self._pack_and_deliver, batch, result))
            else:
                self._post(self._deliver_layer, batch, result)

        def fail(failure: SampleFailure) -> None:
            if packing:  # Not before the sample's layers that still wait to be packed.
                packing.append(self._packer.submit(self._post, self._fail_one, batch, failure))
            else:
                self._post(self._fail_one, batch, failure)

        try:
            planned = [job.planned for job in batch]
            timings = self._runs.run(planned, emit, fail, lambda row: not batch[row].stream.gone)
        finally:
            began = time.perf_counter()
            # Nothing may be delivered after the end of the batch.
            wait(packing)
        for each in packing:
            each.result()
        waited = time.perf_counter() - began
        return partial(self._finish, batch, replace(timings, encode_s=timings.encode_s + waited))

    def _pack_and_deliver(self, batch: list[Job], result: LayerResult) -> None:
        planned = batch[result.indices[0]].planned
        assert planned.kv_map is not None, "the codec comes with its map"
        at = planned.plan.layers.index(result.layer)
        packed = pack_rows(planned.plan, planned.kv_map, at, result.parts, result.positions)
        self._post(self._deliver_layer, batch, replace(result, packed=packed))

    def _generate(self, batch: list[Job], sampling: SamplingParams) -> Callable[[], None]:
        started = time.perf_counter()
        prompts = [job.planned.tokens for job in batch]
        outcomes = self._engine.generate(prompts, sampling, lambda row: not batch[row].stream.gone)
        assert len(outcomes) == len(batch)
        return partial(self._finish_generation, batch, outcomes, time.perf_counter() - started)

    def _post(self, callback: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:
            log.warning("discarded results of a batch: the server has ended")

    def _deliver_layer(self, batch: list[Job], result: LayerResult) -> None:
        by_stream: dict[ClientStream, tuple[list[Job], list[int]]] = {}
        for row, index in enumerate(result.indices):
            jobs, rows = by_stream.setdefault(batch[index].stream, ([], []))
            jobs.append(batch[index])
            rows.append(row)
        for stream, (jobs, rows) in by_stream.items():
            _notify(stream, stream.sink.on_layer, jobs, rows, result)

    def _fail_one(self, batch: list[Job], failure: SampleFailure) -> None:
        job = batch[failure.index]
        job.failed = True
        _notify(job.stream, job.stream.sink.refuse, job.index, "FAILED_PRECONDITION", failure.problem)

    def _finish(self, batch: list[Job], timings: ExecutionTimings) -> None:
        metrics, computed = self._metrics, [job for row, job in enumerate(batch) if row not in timings.reused]
        tokens = sum(job.tokens for job in computed)
        metrics.cached_tokens.inc(timings.cached_tokens)
        if computed:
            metrics.batch_tokens.observe(tokens)
            metrics.batch_samples.observe(len(computed))
        metrics.model_seconds.inc(timings.prefill_s)
        metrics.encode_seconds.inc(timings.encode_s)
        self._count_batch(batch, computed, tokens)
        for stream, jobs in _by_stream(batch).items():
            done = [job for job in jobs if not job.failed]
            spent = [Timings(job.waited, timings.prefill_s, timings.encode_s) for job in done]
            _notify(stream, stream.sink.on_batch_end, done, spent, sum(job.nbytes for job in jobs))

    def _finish_generation(
        self, batch: list[Job], outcomes: Sequence[GeneratedText | SampleFailure], seconds: float
    ) -> None:
        generated = sum(outcome.tokens for outcome in outcomes if isinstance(outcome, GeneratedText))
        self._metrics.generated_tokens.inc(generated)
        self._metrics.generation_seconds.inc(seconds)
        self._count_batch(batch, batch, sum(len(job.planned.tokens.token_ids) for job in batch) + generated)
        outcome_of = dict(zip(batch, outcomes, strict=True))
        for stream, jobs in _by_stream(batch).items():
            assert stream.on_generated is not None
            _notify(stream, stream.on_generated, jobs, [outcome_of[job] for job in jobs], seconds)

    def _fail_batch(self, batch: list[Job], error: Exception) -> None:
        error_id = uuid.uuid4().hex[:12]
        self._metrics.engine_errors.inc()
        tokens = sum(job.tokens for job in batch)
        log_event(
            log, "engine_failed", level=logging.ERROR, error=error, error_id=error_id, samples=len(batch), tokens=tokens
        )
        problem = f"the engine failed on this sample's batch (error {error_id})"
        for stream, jobs in _by_stream(batch).items():
            for job in jobs:
                if not job.failed:
                    _notify(stream, stream.sink.refuse, job.index, "INTERNAL", problem)
            _notify(stream, stream.sink.on_batch_end, [], [], sum(job.nbytes for job in jobs))
        self._on_engine_error(error)

    def _count_batch(self, batch: Sequence[Job], computed: Sequence[Job], tokens: int) -> None:
        self._metrics.tokens.inc(tokens)
        if self._engine.small_batch_tokens is not None and computed:
            self._metrics.padding_tokens.inc(padding([len(job.planned.tokens.token_ids) for job in computed]))
        for job in batch:
            self._metrics.queue_wait.observe(job.waited)


def _by_stream(batch: Sequence[Job]) -> dict[ClientStream, list[Job]]:
    by_stream: dict[ClientStream, list[Job]] = {}
    for job in batch:
        by_stream.setdefault(job.stream, []).append(job)
    return by_stream


def _notify(stream: ClientStream, callback: Callable[..., None], *arguments: object) -> None:
    """Call a stream's callback unless the stream is gone. An exception ends that stream alone."""
    if stream.gone:
        return
    try:
        callback(*arguments)
    except Exception as error:  # noqa: BLE001  the event loop would swallow it, and the caller would wait forever
        stream.sink.on_crash(error)
