"""Keeps what an online run fetches, so that the first epoch becomes the offline store."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path

from kvcore.store.kv_store import KVStoreReader, KVStoreWriter, merge_index
from kvcore.types import EncodedSampleKV, Sample
from student_trainer.kv_sources.base import KVResult, KVSource, WrappingSource


class Record(WrappingSource):
    """Writes each sample once, and reads from the store what is there already instead of asking the teacher.

    So a recording that was interrupted asks only for the rest. What a sample lacks (`MissingKV`) is not stored.
    Only `flush` and `close` make what was fetched safe. For one thread at a time.

    Args:
        source: where K/V come from; already connected.
        directory: the store of this teacher, shared by all ranks.
        writer: this rank's name in the store, such as `rank0`.
        merges_index: whether `close` merges the index of all ranks' journals; for one rank, after the others flushed.

    Raises:
        StoreError: the store holds another teacher or plan, is damaged, or someone else writes under this name.
    """

    def __init__(self, source: KVSource, directory: Path, writer: str, merges_index: bool) -> None:
        super().__init__(source)
        self._directory = directory
        self._merges_index = merges_index
        self._writer = KVStoreWriter(directory, source.info, source.plan, writer)
        self._reader = KVStoreReader(directory)
        self._announced: dict[tuple[Sample, ...], deque[list[Sample]]] = {}
        self._closed = False

    def announce(self, samples: Sequence[Sample]) -> None:
        """Passes on what is not stored yet."""
        wanted = [sample for sample in samples if self._key(sample) not in self._writer]
        # The batch is asked for later exactly as announced, whatever is stored by then.
        self._announced.setdefault(tuple(samples), deque()).append(wanted)
        if wanted:
            self.source.announce(wanted)

    def fetch(self, samples: Sequence[Sample]) -> list[KVResult]:
        """The stored samples from the store, the others from the wrapped source, which are stored on the way.

        Raises:
            StoreError: the store is damaged, or the disk is full.
            KVDistillError: whatever the wrapped source raises.
        """
        wanted = self._wanted(samples)
        fetched: dict[str, KVResult] = {}
        if wanted:
            answers = self.source.fetch(wanted)
            fetched = {sample.id: answer for sample, answer in zip(wanted, answers, strict=True)}
        for result in fetched.values():
            if isinstance(result, EncodedSampleKV):
                self._writer.add(result)
        return [fetched.get(sample.id) or self._read(sample) for sample in samples]

    def flush(self) -> None:
        """Returns when the disk has everything fetched so far."""
        self._writer.flush()

    def close(self) -> None:
        """Flushes, closes the wrapped source, and merges the index where that is this rank's task."""
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

    def _wanted(self, samples: Sequence[Sample]) -> list[Sample]:
        announced = self._announced.get(tuple(samples))
        if announced is None:
            return [sample for sample in samples if self._key(sample) not in self._writer]
        wanted = announced.popleft()
        if not announced:
            del self._announced[tuple(samples)]
        return wanted

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
