"""A replica of a teacher in memory that fails on demand."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from kvcore.errors import TeacherUnavailableError
from kvcore.types import MissingKV, Sample, TeacherInfo
from student_trainer.kv_sources.base import KVResult
from student_trainer.kv_sources.parity import parity_plan, parity_sample
from student_trainer.kv_sources.retry_budget import RetryBudget
from tests.support.kv_fakes import INFO, PLAN, kv_of


class ScriptedReplica:
    """Answers at most `answers_left` samples, then fails with `error` until `answers_left` is set again.

    While it is not `up`, connections fail with `connect_error`. `kv_noise` is added to the values by which replicas are
    compared; `parity` is returned or raised instead of them.
    """

    def __init__(self, endpoint: str, info: TeacherInfo = INFO) -> None:
        self.endpoint = endpoint
        self.plan = PLAN
        self.retries = 0
        self.waits_when_busy = True
        self.budget = RetryBudget()
        self.cancelled = threading.Event()
        self.info = info
        self.up = True
        self.answers_left: int | None = None
        self.error: Exception = TeacherUnavailableError("math", "UNAVAILABLE: connection reset")
        self.connect_error: Exception = TeacherUnavailableError("math", "UNAVAILABLE: connection refused")
        self.asked: list[list[str]] = []
        self.connects = self.parity_checks = 0
        self.kv_noise = 0.0
        self.parity: MissingKV | Exception | None = None
        self.closed = False

    def connect(self) -> TeacherInfo:
        self.connects += 1
        if not self.up:
            raise self.connect_error
        return self.info

    def fetch_into(self, samples: Sequence[Sample], received: dict[str, KVResult]) -> None:
        missing = [sample for sample in samples if sample.id not in received]
        self.asked.append([sample.id for sample in missing])
        for sample in missing:
            if self.answers_left == 0:
                raise self.error
            received[sample.id] = kv_of(sample, self.info)
            if self.answers_left is not None:
                self.answers_left -= 1

    def parity_kv(self) -> KVResult:
        self.parity_checks += 1
        if self.parity is not None:
            if isinstance(self.parity, Exception):
                raise self.parity
            return self.parity
        kv = kv_of(parity_sample(self.info), self.info, parity_plan(self.info))
        kv.parts["v.data"] = kv.parts["v.data"] + self.kv_noise
        return kv

    def cancel(self) -> None:
        self.cancelled.set()

    def resume(self) -> None:
        self.cancelled.clear()

    def close(self) -> None:
        self.closed = True
