"""Tests of the KV store: bit-exact round trips, several writers and readers, and refusal of another teacher or plan."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch

from kvcore.errors import FieldError, StoreError
from kvcore.plan import CodecSpec, KVPlan, Selection
from kvcore.store.kv_store import KVStoreReader, KVStoreWriter, merge_index
from kvcore.store.manifest import MAP_NAME, keep_map, stored_map
from kvcore.types import EncodedSampleKV
from tests.support.file_modes import modes, umask
from tests.support.kv_maps import random_map
from tests.support.stores import SENT, SMALL, assert_holds, fill
from tests.support.streams import INFO, PLAN, UNMAPPED_CODECS, assert_same, read_stream, sample_kv, stream


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return fill(tmp_path / "store")


@pytest.mark.parametrize("codec", UNMAPPED_CODECS)
def test_samples_of_every_codec_round_trip_bit_for_bit(tmp_path, codec):
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


def test_sample_from_a_stream_is_stored_without_the_rest_of_its_buffer(tmp_path):
    arrived = [kv for kv in read_stream(stream(), 3).values() if isinstance(kv, EncodedSampleKV)]
    fill(tmp_path, arrived[:1], shard_bytes=1 << 20)
    assert_holds(tmp_path, arrived[:1])
    (shard,) = tmp_path.glob("*.safetensors")
    assert shard.stat().st_size < 2000


def test_changes_after_add_do_not_reach_the_store(tmp_path):
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


def test_shards_are_split_by_size_and_numbered_per_writer(store):
    assert sorted(path.name for path in store.iterdir()) == [
        "manifest.json",
        *(f"rank0-0000{i}.safetensors" for i in range(len(list(store.glob("*.safetensors"))))),
        "rank0.jsonl",
    ]
    assert len(list(store.glob("*.safetensors"))) >= 3


def test_shard_is_written_when_it_reaches_shard_bytes(tmp_path):
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


def test_reader_limits_its_open_files(store, monkeypatch):
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
        # Both ranks add this sample.
        right.add(SENT[1])
    assert_holds(tmp_path)
    assert merge_index(tmp_path) == len(SENT)
    assert_holds(tmp_path)


def test_concurrent_writers_agree_on_one_manifest(tmp_path):
    barrier = threading.Barrier(8)

    def start(rank: int) -> None:
        barrier.wait()
        fill(tmp_path, SENT[rank : rank + 1], f"rank{rank}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(start, range(8)))
    assert_holds(tmp_path)
    assert not list(tmp_path.glob("*.tmp"))


def test_reopened_writer_skips_stored_samples_and_starts_a_new_shard(store):
    before = {path: path.read_bytes() for path in store.glob("*.safetensors")}
    more = sample_kv(50)
    with KVStoreWriter(store, INFO, PLAN, "rank0", SMALL) as reopened:
        assert SENT[3].key in reopened
        assert more.key not in reopened
        for kv in [*SENT, more]:
            reopened.add(kv)
        assert more.key in reopened
    assert_holds(store, [*SENT, more])
    assert {path: path.read_bytes() for path in before} == before
    assert len(list(store.glob("*.safetensors"))) == len(before) + 1
    with KVStoreWriter(store, INFO, PLAN, "another") as other:
        assert SENT[3].key in other


def test_reader_sees_the_store_as_of_opening(tmp_path):
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


def test_threads_can_read_concurrently(store):
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
def test_store_of_another_teacher_or_plan_is_refused_with_the_difference(store, info, plan, difference):
    with pytest.raises(StoreError, match=difference):
        KVStoreWriter(store, info, plan, "rank1")


def test_replica_of_the_same_teacher_can_continue_the_store(store):
    with KVStoreWriter(store, dataclasses.replace(INFO, engine="vllm", model="other name"), PLAN, "rank1") as writer:
        assert SENT[0].key in writer


def test_sample_of_another_plan_is_refused(tmp_path):
    with KVStoreWriter(tmp_path, INFO, PLAN, "rank0") as store:
        with pytest.raises(StoreError, match="sample 's1' belongs to another plan than the store"):
            store.add(sample_kv(1, PLAN.model_copy(update={"layers": (0, 2)})))
        with pytest.raises(StoreError, match="belongs to another plan"):
            store.add(sample_kv(1, PLAN.model_copy(update={"codec": CodecSpec(name="raw")})))


def test_second_writer_with_the_same_name_is_refused(tmp_path):
    first = KVStoreWriter(tmp_path, INFO, PLAN, "rank0")
    with pytest.raises(StoreError, match=r"rank0\.jsonl: another process is writing"):
        KVStoreWriter(tmp_path, INFO, PLAN, "rank0")
    first.close()
    KVStoreWriter(tmp_path, INFO, PLAN, "rank0").close()


@pytest.mark.parametrize("name", ["", "../x", "a b", "rank-0", "é"])
def test_invalid_writer_name_is_refused(tmp_path, name):
    with pytest.raises(FieldError, match="writer"):
        KVStoreWriter(tmp_path, INFO, PLAN, name)


def test_directory_without_a_manifest_is_refused(tmp_path):
    for open_store in (KVStoreReader, merge_index):
        with pytest.raises(StoreError, match=r"not a KV store: manifest\.json is missing"):
            open_store(tmp_path)


def test_index_older_than_the_journals_is_ignored(store):
    merge_index(store)
    more = sample_kv(50)
    fill(store, [more])
    assert_holds(store, [*SENT, more])
    fill(store, [sample_kv(51)], "rank1")
    assert_holds(store, [*SENT, more, sample_kv(51)])


def test_journals_are_not_read_if_the_index_is_current(store, monkeypatch):
    merge_index(store)
    monkeypatch.setattr("kvcore.store.journal.scan", None)
    assert_holds(store)


def test_damaged_index_is_ignored_with_a_warning(store, caplog):
    merge_index(store)
    index = store / "index.json"
    content = bytearray(index.read_bytes())
    for damaged in (b"", content[:-20], content.replace(b"rank0-00000", b"rank0-00007")):
        index.write_bytes(damaged)
        caplog.clear()
        assert_holds(store)
        assert "index.json: damaged" in caplog.text


@pytest.mark.parametrize(("mask", "mode"), [(0o022, "644"), (0o007, "660"), (0o077, "600")])
def test_all_files_have_the_mode_of_the_umask(mask: int, mode: str, tmp_path: Path) -> None:
    with umask(mask):
        fill(tmp_path / "store")
    found = modes(tmp_path / "store")
    assert sum(name.endswith(".safetensors") for name in found) > 1
    assert set(found.values()) == {mode}, found


# ---------------------------------------------------------------------------------------------------- maps


KV_MAP = random_map(PLAN.layers, INFO.kv_heads * INFO.head_dim)
WHOLE = KVPlan(layers=PLAN.layers, selection=Selection(selector="right", budget=3))
MAPPED = WHOLE.with_map(KV_MAP.named)


@pytest.fixture
def mapped(tmp_path: Path) -> Path:
    keep_map(tmp_path / "mapped", KV_MAP)
    KVStoreWriter(tmp_path / "mapped", INFO, MAPPED, "rank0").close()
    return tmp_path / "mapped"


def test_a_store_keeps_the_map_that_its_plan_names(mapped: Path, store: Path) -> None:
    kept = stored_map(mapped)
    assert kept is not None
    assert kept.named == KV_MAP.named
    assert stored_map(store) is None


def test_a_store_refuses_another_map_and_whole_heads(mapped: Path, tmp_path: Path) -> None:
    KVStoreWriter(tmp_path, INFO, WHOLE, "rank0").close()
    other = random_map(PLAN.layers, INFO.kv_heads * INFO.head_dim, seed=1).named
    with pytest.raises(StoreError, match=f"another plan.map.digest: '{KV_MAP.named.digest}', not '{other.digest}'"):
        KVStoreWriter(mapped, INFO, WHOLE.with_map(other), "rank0")
    with pytest.raises(StoreError, match=r"another plan.map: \{.*\}, not None"):
        KVStoreWriter(mapped, INFO, WHOLE, "rank0")
    with pytest.raises(StoreError, match=r"another plan.map: None, not \{"):
        KVStoreWriter(tmp_path, INFO, MAPPED, "rank0")


def test_a_store_without_its_map_or_with_a_damaged_one_is_refused(mapped: Path) -> None:
    path = mapped / MAP_NAME.format(digest=KV_MAP.named.digest)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"\.kvmap: damaged"):
        stored_map(mapped)
    path.unlink()
    with pytest.raises(StoreError, match=r"\.kvmap: missing"):
        stored_map(mapped)
