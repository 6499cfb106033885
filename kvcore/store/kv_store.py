"""The offline KV store: K/V that a teacher streamed, in safetensors shards.

A directory holds `manifest.json` (teacher and plan), `<digest>.kvmap` if the plan names a map, shards
`<writer>-00000.safetensors` with tensors named `<key>/<part>`, one journal `<writer>.jsonl` per writer and, after
`merge_index`, `index.json`. Shards are written atomically and entered into the journal afterwards, so an interrupted
write leaves no trace in the store.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, KeysView
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from kvcore.errors import FieldError, StoreError
from kvcore.plan import CODED, KVPlan
from kvcore.store.journal import (
    JOURNAL_SUFFIX,
    JournalWriter,
    SampleEntry,
    build_index,
    load_index,
    parse_line,
    write_index,
)
from kvcore.store.manifest import Manifest, claim, read_manifest, stored_map
from kvcore.store.shards import ShardFiles, write_shard
from kvcore.types import EncodedSampleKV, TeacherInfo, Tensor

SHARD_SUFFIX = ".safetensors"
DEFAULT_SHARD_BYTES = 256 * 2**20

# Tensors of a sample in addition to the codec's parts.
POSITIONS, TOKEN_IDS, BYTE_ENDS = "positions", "token_ids", "byte_ends"


def merge_index(directory: Path) -> int:
    """Merges the journals of all writers into `index.json`, so that readers open fast; returns the number of samples.

    Raises:
        StoreError: the directory is not a store, or a journal is damaged.
    """
    read_manifest(directory)
    index = build_index(directory)
    write_index(directory, index)
    return len(index.samples)


@dataclass(frozen=True, slots=True)
class _Pending:
    """A sample that waits for its shard, with its own copy of the tensors."""

    sample_id: str
    tensors: dict[str, Tensor]
    relative_error: dict[str, list[float]]


class KVStoreWriter:
    """Writes samples of one teacher under one plan. Several writers may share a directory under different names.

    Samples stay in memory until a shard is full; `flush` and `close` write them to disk. Not thread-safe.

    Args:
        directory: created if missing.
        info: the teacher of the samples.
        plan: the plan of the samples.
        writer: this writer's name, such as `rank0`: letters, digits and underscores.
        shard_bytes: a shard is written when its tensors have this many bytes.

    Raises:
        FieldError: the writer's name is not valid in a file name.
        StoreError: the directory holds samples of another teacher or plan, or another process writes under this name.
    """

    def __init__(
        self, directory: Path, info: TeacherInfo, plan: KVPlan, writer: str, shard_bytes: int = DEFAULT_SHARD_BYTES
    ) -> None:
        if not re.fullmatch(r"\w+", writer, re.ASCII):
            raise FieldError("writer", f"must be letters, digits and underscores (got '{writer}')")
        self._directory = directory
        self._plan = plan
        self._writer = writer
        self._shard_bytes = shard_bytes
        self._pending: dict[str, _Pending] = {}
        self._pending_bytes = 0
        directory.mkdir(parents=True, exist_ok=True)
        claim(directory, Manifest(info, plan))
        self._journal = JournalWriter(directory / f"{writer}{JOURNAL_SUFFIX}")
        try:
            self._stored = set(load_index(directory).samples)
        except StoreError:
            self._journal.close()
            raise
        for leftover in directory.glob(f"{writer}-*{SHARD_SUFFIX}.tmp"):
            leftover.unlink()
        self._next_shard = 1 + max(
            (_shard_number(path) for path in directory.glob(f"{writer}-*{SHARD_SUFFIX}")), default=-1
        )

    def __contains__(self, key: str) -> bool:
        """Whether the store had this sample when it was opened, or it has been added since."""
        return key in self._stored or key in self._pending

    def add(self, sample: EncodedSampleKV) -> None:
        """Adds a copy of a sample; a sample that is already stored is skipped.

        Raises:
            StoreError: the sample belongs to another plan, or a full shard could not be written.
        """
        if sample.key in self:
            return
        if sample.layers != self._plan.layers or sample.codec != self._plan.codec:
            raise StoreError(f"{self._directory}: sample '{sample.sample_id}' belongs to another plan than the store")
        fixed = {POSITIONS: sample.positions, TOKEN_IDS: sample.token_ids_T, BYTE_ENDS: sample.byte_ends_T}
        # Samples that arrived together share memory. Copies release it and make each tensor contiguous.
        tensors = {
            name: tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
            for name, tensor in {**sample.parts, **fixed}.items()
        }
        self._pending[sample.key] = _Pending(sample.sample_id, tensors, sample.relative_error)
        self._pending_bytes += sum(tensor.nbytes for tensor in tensors.values())
        if self._pending_bytes >= self._shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Writes all pending samples as a shard and syncs it to disk.

        Raises:
            StoreError: the shard could not be written; the samples are kept, and `flush` can be called again.
        """
        if not self._pending:
            return
        shard = f"{self._writer}-{self._next_shard:05d}{SHARD_SUFFIX}"
        placed = write_shard(
            self._directory / shard,
            {f"{key}/{name}": tensor for key, held in self._pending.items() for name, tensor in held.tensors.items()},
        )
        self._next_shard += 1
        self._journal.append(
            SampleEntry(
                key=key,
                sample_id=held.sample_id,
                shard=shard,
                tensors={name: placed[f"{key}/{name}"] for name in held.tensors},
                relative_error=held.relative_error,
            )
            for key, held in self._pending.items()
        )
        self._stored.update(self._pending)
        self._pending, self._pending_bytes = {}, 0

    def close(self) -> None:
        """Flushes and closes the journal. Safe to call twice."""
        try:
            self.flush()
        finally:
            self._journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class KVStoreReader:
    """Reads the samples that a store had when it was opened. Thread-safe.

    Raises:
        StoreError: the directory is not a store, a journal is damaged, or a shard is missing or truncated.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._manifest = read_manifest(directory)
        self._map = stored_map(directory) if self._manifest.plan.codec.name == CODED else None
        index = load_index(directory)
        self._positions = index.samples
        for shard, size in index.shards.items():
            path = directory / shard
            if not path.is_file():
                raise StoreError(f"{path}: missing, but a journal names it")
            if path.stat().st_size < size:
                raise StoreError(f"{path}: truncated: {path.stat().st_size} bytes, the journal needs {size}")
        self._files = ShardFiles(directory)

    @property
    def info(self) -> TeacherInfo:
        """The teacher of the stored K/V."""
        return self._manifest.teacher

    @property
    def plan(self) -> KVPlan:
        """The plan of all stored samples."""
        return self._manifest.plan

    def keys(self) -> KeysView[str]:
        """The stored samples' keys."""
        return self._positions.keys()

    def __contains__(self, key: str) -> bool:
        return key in self._positions

    def __len__(self) -> int:
        return len(self._positions)

    def get(self, key: str) -> EncodedSampleKV | None:
        """Reads and verifies one sample; None if it is not stored.

        Raises:
            StoreError: a file is missing, truncated or damaged.
        """
        if key not in self._positions:
            return None
        entry = self._entry(key)
        tensors = {
            name: self._files.tensor(entry.shard, f"{key}/{name}", tensor) for name, tensor in entry.tensors.items()
        }
        if lacking := [name for name in (POSITIONS, TOKEN_IDS, BYTE_ENDS) if name not in tensors]:
            raise StoreError(f"{self._directory / entry.shard}: sample '{key}' has no tensor '{lacking[0]}'")
        positions, token_ids_T, byte_ends_T = (tensors.pop(name) for name in (POSITIONS, TOKEN_IDS, BYTE_ENDS))
        return EncodedSampleKV(
            sample_id=entry.sample_id,
            key=key,
            layers=self.plan.layers,
            codec=self.plan.codec,
            parts=tensors,
            positions=positions,
            token_ids_T=token_ids_T,
            byte_ends_T=byte_ends_T,
            relative_error=entry.relative_error,
            kv_map=self._map,
        )

    def entries(self) -> Iterator[SampleEntry]:
        """Iterates over the journal entries of all samples (sizes, shapes, errors) without reading tensors.

        Raises:
            StoreError: a journal is damaged.
        """
        return map(self._entry, self._positions)

    def _entry(self, key: str) -> SampleEntry:
        position = self._positions[key]
        entry = parse_line(bytes(self._files.read(position.journal, position.offset, position.length)))
        if entry is None or entry.key != key:
            raise StoreError(f"{self._directory / position.journal}: no entry of '{key}' at byte {position.offset}")
        return entry

    def close(self) -> None:
        """Closes the files. Safe to call twice."""
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _shard_number(path: Path) -> int:
    number = path.name.removesuffix(SHARD_SUFFIX).rpartition("-")[2]
    return int(number) if number.isdecimal() else -1
