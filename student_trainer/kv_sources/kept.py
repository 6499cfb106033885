"""K/V kept in memory between passes over the same samples."""

from __future__ import annotations

from collections.abc import Sequence

from kvcore.types import EncodedSampleKV, Sample
from student_trainer.kv_sources.base import KVResult, KVSource, PendingKV, WrappingSource


class Kept(WrappingSource):
    """Keeps what it fetches, still encoded, and returns it when the same sample is submitted again.

    Args:
        source: where K/V come from.
        most_bytes: of encoded K/V to keep. Samples beyond it are fetched again each time.
    """

    def __init__(self, source: KVSource, most_bytes: int) -> None:
        super().__init__(source)
        self._left = most_bytes
        self._kept: dict[Sample, KVResult] = {}

    def submit(self, samples: Sequence[Sample]) -> PendingKV:
        """Submits the samples that are not kept. `result` keeps them while there is room."""
        wanted = [sample for sample in samples if sample not in self._kept]
        pending = self.source.submit(wanted) if wanted else PendingKV(list)

        def result() -> list[KVResult]:
            fetched = dict(zip(wanted, pending.result(), strict=True))
            for sample, found in fetched.items():
                self._keep(sample, found)
            return [fetched[sample] if sample in fetched else self._kept[sample] for sample in samples]

        return PendingKV(result)

    def _keep(self, sample: Sample, found: KVResult) -> None:
        size = found.nbytes if isinstance(found, EncodedSampleKV) else 0
        if sample not in self._kept and size <= self._left:
            self._kept[sample] = found
            self._left -= size
