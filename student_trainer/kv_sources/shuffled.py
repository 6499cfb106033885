"""The experiment's control: every sample learns from another sample's K/V."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from kvcore.errors import FieldError
from kvcore.types import Sample
from student_trainer.kv_sources.base import KVResult, KVSource, PendingKV, WrappingSource

logger = logging.getLogger(__name__)


def of_other_samples(pending: PendingKV) -> PendingKV:
    """The batch's results rolled by one. `result` raises FieldError for a batch of one sample."""

    def rolled() -> list[KVResult]:
        results = pending.result()
        if len(results) == 1:
            raise FieldError("kv.control", "'shuffled' needs at least 2 samples in every fetched batch; got 1")
        return results[-1:] + results[:-1]

    return PendingKV(rolled)


def warn_of_control(whose: str = "") -> None:
    """Logs that the run is a control. `whose`: which K/V of another sample each sample learns from."""
    logger.warning(
        "kv.control is 'shuffled': every sample is trained on ANOTHER sample's K/V%s. This run is an experiment's "
        "control; do not use its student.",
        whose,
    )


class ShuffledControl(WrappingSource):
    """Gives sample i of a batch the result of sample i-1; the first sample gets the last one's.

    Missing K/V move along. A result keeps its own `sample_id` and `key`. A batch of one sample has no other sample to
    learn from: its result raises FieldError.
    """

    def __init__(self, source: KVSource) -> None:
        super().__init__(source)
        warn_of_control(f" of teacher {source.info.model}")

    def submit(self, samples: Sequence[Sample]) -> PendingKV:
        """Submits to the wrapped source. `result` rolls its results by one."""
        return of_other_samples(self.source.submit(samples))

    def without_control(self) -> KVSource:
        """The wrapped source."""
        return self.source
