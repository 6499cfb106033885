"""Fetches all missing samples from the teachers into their stores, all teachers in parallel."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, ThreadPoolExecutor, wait
from itertools import islice

from extraction.extraction_progress import ExtractionProgress
from extraction.survey import Survey
from extraction.teachers import PREFETCH, Teacher
from kvcore.types import EncodedSampleKV
from student_trainer.kv_sources import PendingKV

# After SIGKILL at most this much work is lost, plus one store shard.
FLUSH_SECONDS = 120.0

Failures = dict[int, str]


def pull(teachers: Sequence[Teacher], rows: Sequence[int], survey: Survey) -> dict[str, Failures]:
    """Fetches and stores missing rows; returns the rows that each teacher could not serve, with reasons.

    Raises:
        KVDistillError: the error of the first teacher that failed; the others are stopped, and fetched rows are kept.
    """
    batches = {teacher.name: list(teacher.batches(rows)) for teacher in teachers}
    lengths = survey.lengths()
    work = {
        name: (sum(map(len, wanted)), int(sum(lengths[row] for batch in wanted for row in batch)))
        for name, wanted in batches.items()
    }
    stop = threading.Event()
    with ExtractionProgress(work) as progress, ThreadPoolExecutor(len(teachers)) as pool:
        pulls = {
            teacher.name: pool.submit(_pull, teacher, batches[teacher.name], survey, progress, stop)
            for teacher in teachers
        }
        try:
            _wait(list(pulls.values()))
        finally:
            stop.set()
            for teacher in teachers:
                teacher.source.close()
    return {name: future.result() for name, future in pulls.items()}


def _wait(futures: Sequence[Future[Failures]]) -> None:
    """Waits for all futures and raises the first error at once. The timeout lets signals interrupt it."""
    waiting = set(futures)
    while waiting:
        done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()


def _pull(
    teacher: Teacher,
    batches: Sequence[Sequence[int]],
    survey: Survey,
    progress: ExtractionProgress,
    stop: threading.Event,
) -> Failures:
    """Fetches all batches of one teacher."""
    failures: Failures = {}
    upcoming = iter(batches)
    ahead = deque(_submitted(teacher, batch) for batch in islice(upcoming, PREFETCH))
    flushed = time.monotonic()
    while ahead and not stop.is_set():
        batch, pending = ahead.popleft()
        ahead.extend(_submitted(teacher, following) for following in islice(upcoming, 1))
        try:
            answers = pending.result()
        except CancelledError:
            # Only `pull` closes a source early, and it says why.
            break
        for row, answer in zip(batch, answers, strict=True):
            if (reason := teacher.keep(row, answer)) is not None:
                failures[row] = reason
        nbytes = sum(answer.nbytes for answer in answers if isinstance(answer, EncodedSampleKV))
        tokens = int(survey.tokens_R3[list(batch)].sum())
        progress.advance(teacher.name, samples=len(batch), tokens=tokens, nbytes=nbytes)
        if time.monotonic() - flushed > FLUSH_SECONDS:
            teacher.writer.flush()
            flushed = time.monotonic()
    return failures


def _submitted(teacher: Teacher, batch: Sequence[int]) -> tuple[Sequence[int], PendingKV]:
    return batch, teacher.source.submit([teacher.sample(row) for row in batch])
