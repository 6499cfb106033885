"""Stores what an online run fetches, so that the first epoch fills the offline store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvcore.store.kv_store import KVStoreReader, KVStoreWriter, merge_index
from kvcore.store.manifest import keep_map
from kvcore.tensors.kv_map import KVMap
from kvcore.types import EncodedSampleKV, Sample
from student_trainer.kv_sources.base import KVResult, KVSource, PendingKV, WrappingSource


class Record(WrappingSource):
    """Writes each sample once, and reads stored samples from the store instead of asking the teacher again.

    A recording that was interrupted therefore requests only what is left. Missing K/V (`MissingKV`) are not stored.
    Fetched samples are safe on disk only after `flush` or `close`. Not thread-safe.

    Args:
        source: where K/V come from; already connected.
        directory: the store of this teacher, shared by all ranks.
        writer: this rank's name in the store, such as `rank0`.
        merges_index: whether `close` merges the index of all ranks' journals; for one rank, after the others flushed.
        kv_map: the map of the source's plan, which the store keeps.

    Raises:
        StoreError: the store holds another teacher or plan, is damaged, or another process writes under this name.
    """

    def __init__(
        self, source: KVSource, directory: Path, writer: str, merges_index: bool, kv_map: KVMap | None = None
    ) -> None:
        super().__init__(source)
        if kv_map is not None:
            keep_map(directory, kv_map)
        self._directory = directory
        self._merges_index = merges_index
        self._writer = KVStoreWriter(directory, source.info, source.plan, writer)
        self._reader = KVStoreReader(directory)
        self._closed = False

    def submit(self, samples: Sequence[Sample]) -> PendingKV:
        """Submits the samples that are not stored yet. `result` stores them, and reads the others from the store.

        `result` raises StoreError if the store is damaged or the disk is full, and what the wrapped source raises.
        """
        missing = [sample for sample in samples if self._key(sample) not in self._writer]
        pending = self.source.submit(missing) if missing else PendingKV(list)
        return PendingKV(lambda: self._store(samples, missing, pending))

    def flush(self) -> None:
        """Returns when everything fetched so far is on disk."""
        self._writer.flush()

    def close(self) -> None:
        """Flushes, closes the wrapped source, and merges the index if this rank does that."""
        if self._closed:
            return
        self._closed = True
        try:
            self.source.close()
        finally:
            self._reader.close()
            self._writer.close()
        if self._merges_index:
            merge_index(self._directory)

    def _store(self, samples: Sequence[Sample], missing: Sequence[Sample], pending: PendingKV) -> list[KVResult]:
        fetched = {sample.id: result for sample, result in zip(missing, pending.result(), strict=True)}
        for result in fetched.values():
            if isinstance(result, EncodedSampleKV):
                self._writer.add(result)
        return [fetched.get(sample.id) or self._read(sample) for sample in samples]

    def _read(self, sample: Sample) -> KVResult:
        key = self._key(sample)
        stored = self._reader.get(key)
        if stored is None:
            # Stored by this run: a reader sees what was on disk when it was opened.
            self._writer.flush()
            self._reader.close()
            self._reader = KVStoreReader(self._directory)
            stored = self._reader.get(key)
        assert stored is not None, "what the writer holds is on disk once flushed"
        stored.sample_id = sample.id
        return stored

    def _key(self, sample: Sample) -> str:
        return sample.key(self.info.weights_digest, self.plan)
