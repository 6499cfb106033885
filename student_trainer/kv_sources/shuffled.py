"""The experiment's control: every sample learns from another sample's K/V."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from kvcore.errors import FieldError
from kvcore.types import Sample
from student_trainer.kv_sources.base import KVResult, KVSource, WrappingSource

logger = logging.getLogger(__name__)


class ShuffledControl(WrappingSource):
    """Hands sample i of a fetched batch what belongs to sample i-1 (the first gets the last's).

    Missing K/V move along. What a result says about itself (`sample_id`, `key`) stays its own.
    """

    def __init__(self, source: KVSource) -> None:
        super().__init__(source)
        logger.warning(
            "kv.control is 'shuffled': every sample is trained on ANOTHER sample's K/V of teacher %s. "
            "This run is an experiment's control; its student must not be used.",
            source.info.model,
        )

    def announce(self, samples: Sequence[Sample]) -> None:
        """Passed on."""
        self.source.announce(samples)

    def fetch(self, samples: Sequence[Sample]) -> list[KVResult]:
        """The wrapped source's results, rolled by one.

        Raises:
            FieldError: a batch of one sample, which has no other sample to learn from.
        """
        if len(samples) == 1:
            raise FieldError("kv.control", "'shuffled' needs at least 2 samples in every fetched batch; got 1")
        results = self.source.fetch(samples)
        return results[-1:] + results[:-1]

    def close(self) -> None:
        """Closes the wrapped source."""
        self.source.close()
