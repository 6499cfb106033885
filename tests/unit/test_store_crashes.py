"""Tests of the KV store after crashes and disk errors: recovery, or an error that names the file; never wrong data."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import os
import re
import signal
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvcore.errors import StoreError
from kvcore.store.journal import TensorEntry, build_index, seal, write_index
from kvcore.store.kv_store import KVStoreReader, KVStoreWriter, merge_index
from kvcore.store.shards import ShardFiles
from tests.support.stores import SENT, SMALL, assert_holds, fill
from tests.support.streams import INFO, PLAN, assert_same, sample_kv


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return fill(tmp_path / "store")


def test_truncated_journal_loses_only_the_entries_after_the_cut(store, tmp_path):
    journal = store / "rank0.jsonl"
    whole = journal.read_bytes()
    ends = [match.end() for match in re.finditer(b"\n", whole)]
    for length in sorted(
        {*range(0, len(whole), 97), *ends, *(end - 1 for end in ends), *(end + 1 for end in ends[:-1])}
    ):
        journal.write_bytes(whole[:length])
        assert_holds(store, SENT[: sum(end <= length for end in ends)])
    journal.write_bytes(whole[: ends[2] + 40])
    fill(store)
    assert_holds(store)
    journal_lines = journal.read_bytes().splitlines()
    assert len({json.loads(line)["key"] for line in journal_lines}) == len(journal_lines) == len(SENT)


@pytest.mark.parametrize("tail", [b"\0" * 300, b"\0" * 300 + b"\n", b'{"key":"x"}\n', b"garbage\ngarbage\n"])
def test_garbage_at_the_end_of_a_journal_is_ignored_and_removed(store, tail, caplog):
    journal = store / "rank0.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole + tail)
    assert_holds(store)
    assert f"ignoring {len(tail)} bytes" in caplog.text
    fill(store, [sample_kv(50)])
    assert_holds(store, [*SENT, sample_kv(50)])
    assert journal.read_bytes().startswith(whole + b'{"key":')


def test_flipped_bit_before_the_last_journal_line_raises(store):
    journal = store / "rank0.jsonl"
    whole = damaged = journal.read_bytes()
    for offset in range(0, whole.rindex(b"\n", 0, -1) + 1, 13):
        damaged = bytearray(whole)
        damaged[offset] ^= 1 << offset % 8
        journal.write_bytes(damaged)
        with pytest.raises(StoreError, match=r"rank0\.jsonl: damaged at byte \d+"):
            KVStoreReader(store)
    with pytest.raises(StoreError, match=r"rank0\.jsonl: damaged at byte \d+"):
        KVStoreWriter(store, INFO, PLAN, "rank0")
    assert journal.read_bytes() == damaged


def test_files_left_by_a_crash_are_ignored_and_their_numbers_not_reused(store):
    count = len(list(store.glob("*.safetensors")))
    orphan = store / f"rank0-{count:05d}.safetensors"
    orphan.write_bytes((store / "rank0-00000.safetensors").read_bytes())
    leftover = store / f"rank0-{count + 1:05d}.safetensors.tmp"
    leftover.write_bytes(b"half")
    foreign = store / "rank1-00000.safetensors.tmp"
    foreign.write_bytes(b"in work")
    assert_holds(store)
    before = orphan.read_bytes()
    fill(store, [sample_kv(50)])
    assert_holds(store, [*SENT, sample_kv(50)])
    assert orphan.read_bytes() == before
    assert not leftover.exists()
    assert foreign.exists()


@pytest.mark.parametrize("merged", [False, True])
def test_missing_shard_raises_with_its_name(store, merged):
    if merged:
        merge_index(store)
    (store / "rank0-00001.safetensors").unlink()
    with pytest.raises(StoreError, match=r"rank0-00001\.safetensors: missing"):
        KVStoreReader(store)


@pytest.mark.parametrize("merged", [False, True])
def test_truncated_shard_raises_with_its_name(store, merged):
    if merged:
        merge_index(store)
    shard = store / "rank0-00001.safetensors"
    whole = shard.read_bytes()
    for length in {*range(0, len(whole), 101), len(whole) - 1}:
        shard.write_bytes(whole[:length])
        with pytest.raises(StoreError, match=r"rank0-00001\.safetensors: truncated"):
            KVStoreReader(store)


def test_shard_deleted_or_truncated_while_open_raises_with_its_name(store):
    shard = store / "rank0-00001.safetensors"
    lines = [json.loads(line) for line in (store / "rank0.jsonl").read_bytes().splitlines()]
    key = next(line["key"] for line in lines if line["shard"] == shard.name)
    with KVStoreReader(store) as reader:
        os.truncate(shard, 100)
        with pytest.raises(StoreError, match=r"rank0-00001\.safetensors: truncated"):
            reader.get(key)
        reader.close()
        shard.unlink()
        with pytest.raises(StoreError, match=r"rank0-00001\.safetensors: cannot read"):
            reader.get(key)


def test_flipped_byte_of_a_tensor_raises_with_its_name(store):
    lines = [json.loads(line) for line in (store / "rank0.jsonl").read_bytes().splitlines()]
    shard = store / lines[0]["shard"]
    whole = shard.read_bytes()
    with KVStoreReader(store) as reader:
        for name, entry in lines[0]["tensors"].items():
            for offset in range(entry["offset"], entry["offset"] + entry["size"], 7):
                damaged = bytearray(whole)
                damaged[offset] ^= 1 << offset % 8
                shard.write_bytes(damaged)
                with pytest.raises(StoreError, match=rf"{shard.name}: tensor '.*/{name}' does not match its xxh3"):
                    reader.get(lines[0]["key"])


def test_journal_damaged_during_a_read_raises_with_its_name(store):
    journal = store / "rank0.jsonl"
    with KVStoreReader(store) as reader:
        content = bytearray(journal.read_bytes())
        content[200] ^= 1
        journal.write_bytes(content)
        with pytest.raises(StoreError, match=rf"rank0\.jsonl: no entry of '{SENT[0].key}' at byte 0"):
            reader.get(SENT[0].key)
        assert_same(reader.get(SENT[-1].key), SENT[-1], timings=False)


def test_index_entry_that_points_to_another_sample_is_detected(store):
    index = build_index(store)
    first, second = SENT[0].key, SENT[1].key
    index.samples[first], index.samples[second] = index.samples[second], index.samples[first]
    write_index(store, index)
    with KVStoreReader(store) as reader, pytest.raises(StoreError, match=rf"rank0\.jsonl: no entry of '{first}'"):
        reader.get(first)


ENTRY = TensorEntry("int8", (2, 3), offset=0, size=6, xxh3="0" * 16)


@pytest.mark.parametrize(
    "entry",
    [
        dataclasses.replace(ENTRY, dtype="object"),
        dataclasses.replace(ENTRY, shape=(2**40, 2**20)),
        dataclasses.replace(ENTRY, size=2**60),
        dataclasses.replace(ENTRY, shape=(3, 2**30), size=3 * 2**30),
        dataclasses.replace(ENTRY, shape=(-2, -3)),
        dataclasses.replace(ENTRY, shape=(-1,), size=-1),
        dataclasses.replace(ENTRY, shape=(0,), size=0),
        dataclasses.replace(ENTRY, offset=-1),
    ],
    ids=range(8),
)
def test_entry_with_impossible_sizes_allocates_nothing(store, entry):
    files = ShardFiles(store)
    tracemalloc.start()
    try:
        with pytest.raises(StoreError, match=r"has the invalid entry|truncated"):
            files.tensor("rank0-00000.safetensors", "key/part", entry)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
        files.close()


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/b"])
def test_journal_cannot_refer_to_files_outside_the_store(store, name):
    (store.parent / "secret").write_bytes(bytes(100))
    with pytest.raises(StoreError, match=f"names '{name}', not a file of the store"):
        ShardFiles(store).tensor(name, "key/part", ENTRY)


def test_file_truncated_during_a_read_raises(store, monkeypatch):
    with KVStoreReader(store) as reader:
        monkeypatch.setattr(os, "preadv", lambda *_: 0)
        with pytest.raises(StoreError, match="truncated while it was being read"):
            reader.get(SENT[0].key)


def test_store_of_another_format_is_refused(store):
    manifest = store / "manifest.json"
    content = json.loads(manifest.read_bytes())
    del content["check"]
    manifest.write_bytes(seal(content | {"format": 2}))
    with pytest.raises(StoreError, match=r"manifest\.json: store format 2, this version reads 1"):
        KVStoreReader(store)


def reseal(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the first object of a file and gives it a digest that fits."""
    first, *rest = path.read_bytes().splitlines(keepends=True)
    content = json.loads(first)
    del content["check"]
    change(content)
    path.write_bytes(seal(content) + b"\n" * first.endswith(b"\n") + b"".join(rest))


def read_all(store: Path) -> None:
    with KVStoreReader(store) as reader:
        for key in list(reader.keys()):
            reader.get(key)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("manifest.json", lambda c: c.update(plan={"layers": [2, 1]})),
        ("manifest.json", lambda c: c.update(plan=[])),
        ("manifest.json", lambda c: c["teacher"].pop("layers")),
        ("manifest.json", lambda c: c.update(teacher=None)),
        ("rank0.jsonl", lambda c: c["tensors"].pop("positions")),
        ("rank0.jsonl", lambda c: c.update(tensors={})),
        ("index.json", lambda c: c["samples"].update({SENT[0].key: ["rank0.jsonl", 0, -5]})),
        ("index.json", lambda c: c["samples"].update({SENT[0].key: ["rank0.jsonl", -5, 10]})),
        ("index.json", lambda c: c["samples"].update({SENT[0].key: ["rank0.jsonl", 0, 2**62]})),
    ],
    ids=range(9),
)
def test_files_with_a_digest_that_fits_and_impossible_content_are_store_errors(store, name, change):
    write_index(store, build_index(store))
    if name != "index.json":
        (store / "index.json").unlink()
    reseal(store / name, change)
    with pytest.raises(StoreError) as caught:
        read_all(store)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"samples": 3}, {"shards": {"x": "y"}}], ids=["samples", "shards"])
def test_an_index_that_no_version_wrote_is_not_used(store, change):
    write_index(store, build_index(store))
    reseal(store / "index.json", lambda content: content.update(change))
    assert_holds(store)


@pytest.mark.parametrize(
    "damage", [lambda c: c[:-9], lambda c: c.replace(b"fake", b"fale"), lambda c: b"{}"], ids=range(3)
)
def test_damaged_manifest_raises_with_its_name(store, damage):
    manifest = store / "manifest.json"
    manifest.write_bytes(damage(manifest.read_bytes()))
    with pytest.raises(StoreError, match=r"manifest\.json: damaged"):
        KVStoreReader(store)


@pytest.mark.parametrize("failing_call", [1, 2])
def test_full_disk_loses_no_added_sample(tmp_path, monkeypatch, failing_call):
    fill(tmp_path, SENT[:2])
    store = KVStoreWriter(tmp_path, INFO, PLAN, "rank0")
    for kv in SENT[2:]:
        store.add(kv)
    real, calls = os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        # A flush syncs the shard first, the directory second and the journal third.
        if len(calls) == {1: 1, 2: 3}[failing_call]:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        store.flush()
    assert_holds(tmp_path, SENT[:2])
    assert not list(tmp_path.glob("*.tmp"))
    store.close()
    assert_holds(tmp_path)


def write_forever(directory: Path) -> None:
    with KVStoreWriter(directory, INFO, PLAN, "rank0", SMALL) as store:
        index = 0
        while True:
            store.add(sample_kv(index))
            index += 1


def test_killed_writer_leaves_a_valid_store_that_can_be_continued(tmp_path):
    journal, count = tmp_path / "rank0.jsonl", 0
    for round_number in range(4):
        process = multiprocessing.get_context("fork").Process(target=write_forever, args=(tmp_path,))
        process.start()
        assert process.pid is not None
        target = count + 2 + round_number
        while not journal.exists() or journal.read_bytes().count(b"\n") < target:
            time.sleep(0.003 * (round_number + 1))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        with KVStoreReader(tmp_path) as reader:
            count = len(reader)
            assert count >= target
            assert_holds(tmp_path, [sample_kv(index) for index in range(count)])
    assert merge_index(tmp_path) == count
