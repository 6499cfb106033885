"""Fetches submitted batches in a background thread, so that training does not wait for teachers."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future

from kvcore.types import EncodedSampleKV, Sample
from student_trainer.kv_sources.base import KVResult, KVSource, PendingKV, WrappingSource

logger = logging.getLogger(__name__)

JOIN_SECONDS = 5.0
# Encoded K/V that one source may hold. A batch that is larger is still fetched, but no other one beside it.
MOST_BYTES = 512 << 20


class _Job(Future[list[KVResult]]):
    """One submitted batch.

    `claimed`: a caller waits for it, or has taken its result. `nbytes`: of its K/V while they wait for a caller.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        super().__init__()
        self.samples = tuple(samples)
        self.claimed = False
        self.nbytes = 0


class Prefetch(WrappingSource):
    """Fetches submitted batches in order, up to `depth` and about `most_bytes` before their results are asked for.

    A batch whose result a caller waits for goes first. One thread makes every call of the wrapped source, so that
    source need not be thread-safe. Results raise `concurrent.futures.CancelledError` for batches that `close` dropped.
    """

    def __init__(self, source: KVSource, depth: int, most_bytes: int = MOST_BYTES) -> None:
        assert depth >= 1, "a depth of 0 means no Prefetch at all"
        super().__init__(source)
        self._depth, self._most_bytes = depth, most_bytes
        self._queue: deque[_Job] = deque()
        self._ahead = self._held_bytes = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="kv-prefetch", daemon=True)
        self._thread.start()

    def submit(self, samples: Sequence[Sample]) -> PendingKV:
        """Queues a batch; never blocks."""
        job = _Job(samples)
        with self._changed:
            if self._closed:
                job.cancel()
            else:
                self._queue.append(job)
                self._changed.notify()
        return PendingKV(lambda: self._wait_for(job))

    def close(self) -> None:
        """Cancels queued batches, closes the wrapped source, which ends a fetch in progress, and joins the thread."""
        with self._changed:
            self._closed = True
            for job in self._queue:
                job.cancel()
            self._queue.clear()
            self._changed.notify()
        self.source.close()
        self._thread.join(JOIN_SECONDS)
        if self._thread.is_alive():
            logger.warning("a background fetch did not end within %g s after it was closed", JOIN_SECONDS)

    def _wait_for(self, job: _Job) -> list[KVResult]:
        with self._changed:
            job.claimed = True
            if job in self._queue:
                self._queue.remove(job)
                self._queue.appendleft(job)
            else:
                self._ahead -= 1
                self._held_bytes -= job.nbytes
                job.nbytes = 0
            self._changed.notify()
        return job.result()

    def _run(self) -> None:
        while (job := self._next_job()) is not None:
            try:
                results = self.source.fetch(job.samples)
            except BaseException as error:  # noqa: BLE001 - raised in the thread that waits for this batch
                job.set_exception(error)
            else:
                self._hold(job, results)
                job.set_result(results)

    def _hold(self, job: _Job, results: Sequence[KVResult]) -> None:
        """Counts the bytes of a batch that no caller waits for yet."""
        with self._changed:
            if not job.claimed:
                job.nbytes = sum(result.nbytes for result in results if isinstance(result, EncodedSampleKV))
                self._held_bytes += job.nbytes

    def _next_job(self) -> _Job | None:
        """Waits until a batch may be fetched; None once closed."""
        with self._changed:
            self._changed.wait_for(self._may_continue)
            if self._closed:
                return None
            job = self._queue.popleft()
            job.set_running_or_notify_cancel()
            if not job.claimed:
                self._ahead += 1
            return job

    def _may_continue(self) -> bool:
        if self._closed:
            return True
        has_room = self._ahead < self._depth and self._held_bytes < self._most_bytes
        return bool(self._queue) and (self._queue[0].claimed or has_room)
