"""Fetches announced batches on a thread of its own, so that training does not wait for teachers."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from kvcore.types import Sample
from student_trainer.kv_sources.base import KVResult, KVSource, WrappingSource

logger = logging.getLogger(__name__)

JOIN_SECONDS = 5.0


@dataclass(slots=True, eq=False)
class _Job:
    samples: tuple[Sample, ...]
    future: Future[list[KVResult]] = field(default_factory=Future)
    claimed: bool = False


class Prefetch(WrappingSource):
    """Keeps up to `depth` announced batches fetched ahead, in the order of their announcement.

    One thread makes every call of the wrapped source, so that source need not be safe for threads. A batch that
    was not announced overtakes those that nobody waits for yet.
    """

    def __init__(self, source: KVSource, depth: int) -> None:
        assert depth >= 1, "a depth of 0 means no Prefetch at all"
        super().__init__(source)
        self.stall_seconds = 0.0
        self._depth = depth
        self._waiting: deque[_Job] = deque()
        # By content, as training and validation may share ids.
        self._announced: dict[tuple[Sample, ...], deque[_Job]] = {}
        self._ahead = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="kv-prefetch", daemon=True)
        self._thread.start()

    def announce(self, samples: Sequence[Sample]) -> None:
        """Queues a batch; never blocks. The matching `fetch` is the one with the same samples in the same order."""
        job = _Job(tuple(samples))
        with self._changed:
            if self._closed:
                return
            self._waiting.append(job)
            self._announced.setdefault(job.samples, deque()).append(job)
            self._changed.notify()

    def fetch(self, samples: Sequence[Sample]) -> list[KVResult]:
        """Waits for the announced batch, or fetches one that was not announced.

        Raises:
            concurrent.futures.CancelledError: the source was closed before the batch was there.
            KVDistillError: whatever the wrapped source raised for this batch.
        """
        started = time.monotonic()
        job = self._claim(tuple(samples))
        try:
            return job.future.result()
        finally:
            self.stall_seconds += time.monotonic() - started

    def close(self) -> None:
        """Closes the wrapped source, which ends a fetch that is under way, and then the thread."""
        with self._changed:
            self._closed = True
            unstarted = list(self._waiting)
            self._waiting.clear()
            self._announced.clear()
            self._changed.notify()
        for job in unstarted:
            job.future.cancel()
        self.source.close()
        self._thread.join(JOIN_SECONDS)
        if self._thread.is_alive():
            logger.warning("a background fetch did not end within %g s of being closed", JOIN_SECONDS)

    def _claim(self, samples: tuple[Sample, ...]) -> _Job:
        """The announced job of this batch, or one of its own; the thread turns to it before any other."""
        job = _Job(samples)
        with self._changed:
            announced = self._announced.get(job.samples)
            if announced:
                job = announced.popleft()
                if not announced:
                    del self._announced[job.samples]
            if self._closed:
                job.future.cancel()
                return job
            self._turn_to(job)
            self._changed.notify()
        return job

    def _turn_to(self, job: _Job) -> None:
        job.claimed = True
        if job in self._waiting:
            self._waiting.remove(job)
            self._waiting.appendleft(job)
        elif job.future.running() or job.future.done():
            self._ahead -= 1
        else:
            self._waiting.appendleft(job)

    def _run(self) -> None:
        while (job := self._next_job()) is not None:
            try:
                results = self.source.fetch(job.samples)
            except BaseException as error:  # noqa: BLE001 - whatever it is, the fetch that waits for this batch raises it
                job.future.set_exception(error)
            else:
                job.future.set_result(results)

    def _next_job(self) -> _Job | None:
        """Waits until a batch may be fetched; None once closed."""
        with self._changed:
            self._changed.wait_for(self._has_work)
            if self._closed:
                return None
            job = self._waiting.popleft()
            job.future.set_running_or_notify_cancel()
            if not job.claimed:
                self._ahead += 1
            return job

    def _has_work(self) -> bool:
        if self._closed:
            return True
        return bool(self._waiting) and (self._waiting[0].claimed or self._ahead < self._depth)
