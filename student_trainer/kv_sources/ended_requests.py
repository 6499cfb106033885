"""Finds samples on which servers fail, so that the run treats them as missing and does not lose the teacher."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence

from kvcore.errors import TeacherUnavailableError
from kvcore.types import MissingKV, Sample
from student_trainer.kv_sources.base import KVResult

logger = logging.getLogger(__name__)

# A sample is requested alone after this many endpoints have failed on requests with it.
SUSPECTED_AT = 2


class EndedRequests:
    """The requests of one fetch that ended an endpoint: it crashed, or did not answer in time.

    If two endpoints failed on requests with a sample, it is requested alone once. If an endpoint fails on this request,
    too, while other samples are answered, its K/V are missing. If no sample is answered, the teacher is lost instead.

    Args:
        teacher: the teacher's name in the configuration.
    """

    def __init__(self, teacher: str) -> None:
        self._teacher = teacher
        self._ended: defaultdict[str, set[str]] = defaultdict(set)
        self._failed_alone: dict[str, str] = {}
        self._received_before: int | None = None

    def next_request(self, samples: Sequence[Sample], received: Mapping[str, KVResult]) -> list[Sample]:
        """The samples to request next: all that are not suspected, then each of the others alone."""
        missing = [sample for sample in samples if sample.id not in received]
        if unsuspected := [sample for sample in missing if not self._suspected(sample.id)]:
            return unsuspected
        return ([sample for sample in missing if sample.id not in self._failed_alone] or missing)[:1]

    def note(
        self,
        requested: Sequence[Sample],
        received: Mapping[str, KVResult],
        endpoint: str,
        error: TeacherUnavailableError,
    ) -> None:
        """Notes that a request ended an endpoint."""
        if len(requested) == 1 and self._suspected(requested[0].id):
            self._failed_alone[requested[0].id] = f"{endpoint}: {error.problem}"
            return
        for sample in requested:
            if sample.id not in received:
                self._ended[sample.id].add(endpoint)
        suspected = dict.fromkeys(sample.id for sample in requested if self._suspected(sample.id))
        if suspected:
            self._received_before = len(received)
            logger.warning(
                "teacher '%s': %d endpoints failed on requests with the same samples; requesting each alone: %s",
                self._teacher,
                SUSPECTED_AT,
                ", ".join(suspected),
            )

    def give_up(self, samples: Sequence[Sample], received: dict[str, KVResult]) -> None:
        """Adds the samples that no server survives to `received`, as missing."""
        missing = dict.fromkeys(sample.id for sample in samples if sample.id not in received)
        if self._received_before is None or not missing.keys() <= self._failed_alone.keys():
            return
        if len(received) > self._received_before or len(missing) == len({sample.id for sample in samples}) == 1:
            for sample_id in missing:
                problem = (
                    f"{SUSPECTED_AT} endpoints failed on requests with it, and another one on a request with it alone"
                )
                received[sample_id] = MissingKV(sample_id, f"UNAVAILABLE: {problem} ({self._failed_alone[sample_id]})")

    def _suspected(self, sample_id: str) -> bool:
        return len(self._ended[sample_id]) >= SUSPECTED_AT
