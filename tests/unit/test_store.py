"""The store gives back what it was given, and refuses what belongs to another teacher or plan."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch

from kvcore.errors import FieldError, StoreError
from kvcore.plan import CODECS, CodecSpec, KVPlan, Selection
from kvcore.store.kv_store import KVStoreReader, KVStoreWriter, merge_index
from kvcore.types import EncodedSampleKV
from tests.support.stores import SENT, SMALL, assert_holds, fill
from tests.support.streams import INFO, PLAN, assert_same, read_stream, sample_kv, stream


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return fill(tmp_path / "store")


@pytest.mark.parametrize("codec", CODECS)
def test_samples_of_every_codec_come_back_bit_for_bit(tmp_path, codec):
    plan = KVPlan(layers=(1, 3), selection=Selection(selector="right", budget=3), codec=CodecSpec(name=codec))
    sent = [sample_kv(i, plan) for i in range(3)]
    with KVStoreWriter(tmp_path, INFO, plan, "rank0") as store:
        for kv in sent:
            store.add(kv)
    assert_holds(tmp_path, sent)
    with KVStoreReader(tmp_path) as store:
        assert (store.info, store.plan) == (INFO, plan)
        assert store.get("no such key") is None
        assert "no such key" not in store
        assert sent[0].key in store


def test_samples_as_a_stream_delivers_them_are_stored_without_their_neighbours(tmp_path):
    arrived = [kv for kv in read_stream(stream(), 3).values() if isinstance(kv, EncodedSampleKV)]
    fill(tmp_path, arrived[:1], shard_bytes=1 << 20)
    assert_holds(tmp_path, arrived[:1])
    (shard,) = tmp_path.glob("*.safetensors")
    assert shard.stat().st_size < 2000


def test_a_sample_changed_after_it_was_added_is_stored_as_it_was(tmp_path):
    kv, original = sample_kv(0), sample_kv(0)
    with KVStoreWriter(tmp_path, INFO, PLAN, "rank0") as store:
        store.add(kv)
        kv.parts["k.codes"].zero_()
    assert_holds(tmp_path, [original])


def test_shards_are_plain_safetensors(store):
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(store.glob("*.safetensors")):
        tensors |= safetensors.torch.load_file(shard)
    assert len(tensors) == len(SENT) * (len(SENT[0].parts) + 3)
    for kv in SENT:
        for name, part in [*kv.parts.items(), ("positions", kv.positions), ("token_ids", kv.token_ids_T)]:
            assert torch.equal(tensors[f"{kv.key}/{name}"], part)


def test_shards_are_cut_by_size_and_numbered_by_writer(store):
    assert sorted(path.name for path in store.iterdir()) == [
        "manifest.json",
        *(f"rank0-0000{i}.safetensors" for i in range(len(list(store.glob("*.safetensors"))))),
        "rank0.jsonl",
    ]
    assert len(list(store.glob("*.safetensors"))) >= 3


def test_a_shard_is_written_when_it_holds_the_bytes_it_was_given(tmp_path):
    kv = sample_kv(0)
    size = kv.nbytes + sum(tensor.nbytes for tensor in (kv.positions, kv.token_ids_T, kv.byte_ends_T))
    with KVStoreWriter(tmp_path, INFO, PLAN, "rank0", shard_bytes=size) as store:
        store.add(kv)
        assert_holds(tmp_path, [kv])
    with KVStoreWriter(tmp_path, INFO, PLAN, "rank1", shard_bytes=size + 1) as store:
        store.add(sample_kv(1))
        assert sample_kv(1).key in store
        store.add(sample_kv(1))
        assert_holds(tmp_path, [kv])


def test_a_reader_keeps_few_files_open(store, monkeypatch):
    monkeypatch.setattr("kvcore.store.shards._OPEN_FILES", 2)
    with KVStoreReader(store) as reader:
        before = len(list(Path("/proc/self/fd").iterdir()))
        for kv in SENT * 3:
            assert_same(reader.get(kv.key), kv, timings=False)
            assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_several_writers_share_a_directory(tmp_path):
    with (
        KVStoreWriter(tmp_path, INFO, PLAN, "rank0", SMALL) as left,
        KVStoreWriter(tmp_path, INFO, PLAN, "rank1", SMALL) as right,
    ):
        for index, kv in enumerate(SENT):
            (left if index % 2 else right).add(kv)
        # Both ranks meet this one.
        right.add(SENT[1])
    assert_holds(tmp_path)
    assert merge_index(tmp_path) == len(SENT)
    assert_holds(tmp_path)


def test_writers_that_start_at_once_agree_on_one_manifest(tmp_path):
    barrier = threading.Barrier(8)

    def start(rank: int) -> None:
        barrier.wait()
        fill(tmp_path, SENT[rank : rank + 1], f"rank{rank}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(start, range(8)))
    assert_holds(tmp_path)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_writer_reopened_skips_what_is_stored_and_takes_the_next_shard(store):
    before = {path: path.read_bytes() for path in store.glob("*.safetensors")}
    more = sample_kv(50)
    with KVStoreWriter(store, INFO, PLAN, "rank0", SMALL) as again:
        assert SENT[3].key in again
        assert more.key not in again
        for kv in [*SENT, more]:
            again.add(kv)
        assert more.key in again
    assert_holds(store, [*SENT, more])
    assert {path: path.read_bytes() for path in before} == before
    assert len(list(store.glob("*.safetensors"))) == len(before) + 1
    with KVStoreWriter(store, INFO, PLAN, "another") as other:
        assert SENT[3].key in other


def test_readers_see_the_store_as_it_was_opened(tmp_path):
    with KVStoreWriter(tmp_path, INFO, PLAN, "rank0") as writer:
        writer.add(SENT[0])
        with KVStoreReader(tmp_path) as reader:
            assert len(reader) == 0
        writer.flush()
        with KVStoreReader(tmp_path) as reader:
            writer.add(SENT[1])
            writer.flush()
            assert set(reader.keys()) == {SENT[0].key}
            assert_same(reader.get(SENT[0].key), SENT[0], timings=False)


def test_several_threads_read_at_once(store):
    with KVStoreReader(store) as reader, ThreadPoolExecutor(4) as pool:
        for kv, got in zip(SENT * 10, pool.map(lambda kv: reader.get(kv.key), SENT * 10), strict=True):
            assert_same(got, kv, timings=False)


OTHER_PLAN = PLAN.model_copy(update={"selection": Selection(selector="right", budget=4, scope="head")})


@pytest.mark.parametrize(
    ("info", "plan", "difference"),
    [
        (INFO, OTHER_PLAN, "another plan.selection.budget: 3, not 4"),
        (INFO, PLAN.model_copy(update={"layers": (0, 2)}), r"another plan.layers: \(0, 2, 4\), not \(0, 2\)"),
        (dataclasses.replace(INFO, weights_digest="ff"), PLAN, "another teacher.weights_digest: 'a1.*', not 'ff'"),
        (dataclasses.replace(INFO, tokenizer_fingerprint="ff"), PLAN, "teacher.tokenizer_fingerprint"),
        (dataclasses.replace(INFO, model="other", engine="hf", head_dim=8), PLAN, "teacher.head_dim: 4, not 8"),
    ],
    ids=range(5),
)
def test_a_store_of_another_teacher_or_plan_is_refused_by_the_difference(store, info, plan, difference):
    with pytest.raises(StoreError, match=difference):
        KVStoreWriter(store, info, plan, "rank1")


def test_a_replica_of_the_teacher_may_write_on(store):
    with KVStoreWriter(store, dataclasses.replace(INFO, engine="vllm", model="other name"), PLAN, "rank1") as writer:
        assert SENT[0].key in writer


def test_a_sample_of_another_plan_is_refused(tmp_path):
    with KVStoreWriter(tmp_path, INFO, PLAN, "rank0") as store:
        with pytest.raises(StoreError, match="sample 's1' belongs to another plan than the store"):
            store.add(sample_kv(1, PLAN.model_copy(update={"layers": (0, 2)})))
        with pytest.raises(StoreError, match="belongs to another plan"):
            store.add(sample_kv(1, PLAN.model_copy(update={"codec": CodecSpec(name="raw")})))


def test_two_writers_of_one_name_are_refused(tmp_path):
    first = KVStoreWriter(tmp_path, INFO, PLAN, "rank0")
    with pytest.raises(StoreError, match=r"rank0\.jsonl: another process is writing"):
        KVStoreWriter(tmp_path, INFO, PLAN, "rank0")
    first.close()
    KVStoreWriter(tmp_path, INFO, PLAN, "rank0").close()


@pytest.mark.parametrize("name", ["", "../x", "a b", "rank-0", "é"])
def test_a_writer_name_that_is_no_plain_name_is_refused(tmp_path, name):
    with pytest.raises(FieldError, match="writer"):
        KVStoreWriter(tmp_path, INFO, PLAN, name)


def test_a_directory_that_is_no_store_is_refused(tmp_path):
    for open_it in (KVStoreReader, merge_index):
        with pytest.raises(StoreError, match=r"not a KV store: manifest\.json is missing"):
            open_it(tmp_path)


def test_an_index_older_than_the_journals_is_passed_over(store):
    merge_index(store)
    more = sample_kv(50)
    fill(store, [more])
    assert_holds(store, [*SENT, more])
    fill(store, [sample_kv(51)], "rank1")
    assert_holds(store, [*SENT, more, sample_kv(51)])


def test_a_current_index_spares_reading_the_journals(store, monkeypatch):
    merge_index(store)
    monkeypatch.setattr("kvcore.store.journal.scan", None)
    assert_holds(store)


def test_a_damaged_index_is_passed_over_with_a_warning(store, caplog):
    merge_index(store)
    index = store / "index.json"
    content = bytearray(index.read_bytes())
    for damaged in (b"", content[:-20], content.replace(b"rank0-00000", b"rank0-00007")):
        index.write_bytes(damaged)
        caplog.clear()
        assert_holds(store)
        assert "index.json: damaged" in caplog.text
