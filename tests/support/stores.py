"""A small store of known samples, in several shards."""

from __future__ import annotations

from pathlib import Path

from kvcore.store.kv_store import KVStoreReader, KVStoreWriter
from kvcore.types import EncodedSampleKV
from tests.support.streams import INFO, PLAN, assert_same, sample_kv

SENT = [sample_kv(i, slots=1 + i % 3) for i in range(7)]
# Two samples to a shard.
SMALL = 2 * min(kv.nbytes for kv in SENT)


def fill(directory: Path, sent: list[EncodedSampleKV] = SENT, writer: str = "rank0", shard_bytes: int = SMALL) -> Path:
    with KVStoreWriter(directory, INFO, PLAN, writer, shard_bytes) as store:
        for kv in sent:
            store.add(kv)
    return directory


def assert_holds(directory: Path, sent: list[EncodedSampleKV] = SENT) -> None:
    with KVStoreReader(directory) as store:
        assert set(store.keys()) == {kv.key for kv in sent}
        assert len(store) == len(sent)
        for kv in sent:
            assert_same(store.get(kv.key), kv, timings=False)
