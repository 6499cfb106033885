"""K/V that a recording run stored: no teacher, no network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from kvcore.plan import KVPlan
from kvcore.store.kv_store import KVStoreReader
from kvcore.store.manifest import Manifest, claim
from kvcore.types import MissingKV, Sample, TeacherInfo
from student_trainer.kv_sources.base import KVResult, KVSource


class OfflineSource(KVSource):
    """Reads one teacher's store. Samples are found by content: the same text under the same plan, whatever its id.

    Args:
        directory: the store of this teacher.
        plan_for: makes the plan for a teacher of this geometry; it must be the recorded plan.

    Raises:
        StoreError: there is no store, it is damaged, or it holds another plan; names what differs.
    """

    def __init__(self, directory: Path, plan_for: Callable[[TeacherInfo], KVPlan]) -> None:
        self._directory = directory
        self._reader = KVStoreReader(directory)
        self._plan = plan_for(self._reader.info)
        claim(directory, Manifest(self._reader.info, self._plan))

    @property
    def info(self) -> TeacherInfo:
        """The recorded teacher."""
        return self._reader.info

    @property
    def plan(self) -> KVPlan:
        """The recorded plan."""
        return self._plan

    def fetch(self, samples: Sequence[Sample]) -> list[KVResult]:
        """Reads every sample; one that was never recorded is missing.

        Raises:
            StoreError: a shard is damaged.
        """
        return [self._read(sample) for sample in samples]

    def close(self) -> None:
        """Closes the files."""
        self._reader.close()

    def _read(self, sample: Sample) -> KVResult:
        stored = self._reader.get(sample.key(self.info.weights_digest, self._plan))
        if stored is None:
            return MissingKV(sample.id, f"not in the store {self._directory}; record it with kv.mode=record first")
        stored.sample_id = sample.id
        return stored
