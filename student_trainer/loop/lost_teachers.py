"""Decides whether training continues without the K/V of teachers that do not answer (`kv.on_lost: mask`)."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from data.records import Record
from kvcore.errors import TeacherUnavailableError
from kvcore.types import MissingKV
from student_trainer.config import KVConfig
from student_trainer.kv_sources import KVResult, PendingKV

logger = logging.getLogger(__name__)


class LostTeachers:
    """Counts, on one rank, for how many steps each teacher has been lost.

    An error of `check` ends the run on all ranks: before each micro-batch they agree whether all can continue.

    Args:
        kv: what to do about lost teachers.
        teachers: number of teachers.
    """

    def __init__(self, kv: KVConfig, teachers: int) -> None:
        self._kv, self._teachers = kv, teachers
        self._steps: dict[str, int] = {}
        self._problems: dict[str, str] = {}

    def results(self, name: str, pending: PendingKV, records: Sequence[Record]) -> tuple[list[KVResult], str]:
        """A teacher's results for a micro-batch, and what to do about missing ones: `fail` or `mask`.

        Raises:
            TeacherUnavailableError: the teacher does not answer, and `kv.on_lost` is `fail`.
        """
        try:
            results = pending.result()
        except TeacherUnavailableError as error:
            if self._kv.on_lost == "fail":
                raise
            if name not in self._steps:
                logger.warning("%s; training continues without its K/V for up to %d steps", error, self._kv.lost_steps)
            self._steps.setdefault(name, 0)
            self._problems[name] = error.problem
            return [MissingKV(record.id, f"UNAVAILABLE: {error.problem}") for record in records], "mask"
        if name in self._steps:
            logger.warning("teacher '%s' answers again, after %d steps without it", name, self._steps.pop(name))
        return results, self._kv.on_missing

    def check(self) -> None:
        """Called after a micro-batch was requested from all teachers.

        Raises:
            TeacherUnavailableError: too few teachers answer, or one has been lost for too long.
        """
        answering, needed = self._teachers - len(self._steps), self._kv.min_teachers
        for name, steps in self._steps.items():
            if answering < needed:
                limit = f"{answering} of {self._teachers} teachers answer, and kv.min_teachers is {needed}"
                raise TeacherUnavailableError(name, f"{limit}; {self._problems[name]}")
            if steps >= self._kv.lost_steps:
                limit = f"lost for {steps} steps, and kv.lost_steps is {self._kv.lost_steps}"
                raise TeacherUnavailableError(name, f"{limit}; {self._problems[name]}")

    def step_done(self) -> None:
        """Counts one step of training."""
        for name in self._steps:
            self._steps[name] += 1
