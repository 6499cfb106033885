"""Shards of the store: safetensors files, written atomically, and verified reads of single tensors."""

from __future__ import annotations

import json
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import safetensors.torch
import torch
import xxhash
from safetensors import SafetensorError

from kvcore.errors import StoreError
from kvcore.files import follow_umask, sync
from kvcore.store.journal import TensorEntry
from kvcore.tensors.codec import PART_DTYPES
from kvcore.types import Tensor
from kvcore.wire.frames import dtype_name

_DTYPES = {dtype_name(dtype): dtype for dtype in PART_DTYPES}
_OPEN_FILES = 64


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, TensorEntry]:
    """Writes contiguous CPU tensors and returns the position of each.

    Raises:
        StoreError: the shard could not be written; there is no file at `path`.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        safetensors.torch.save_file(dict(tensors), temporary)  # pyright: ignore[reportUnknownMemberType]
        follow_umask(temporary)
        with temporary.open("rb") as file:
            offsets = _offsets(file.read(int.from_bytes(file.read(8), "little")))
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise StoreError(f"{path}: cannot write: {error}") from error
    return {
        name: TensorEntry(
            dtype=dtype_name(tensor.dtype),
            shape=tuple(tensor.shape),
            offset=offsets[name],
            size=tensor.nbytes,
            xxh3=xxhash.xxh3_64_hexdigest(tensor.reshape(-1).view(torch.uint8).numpy().data),
        )
        for name, tensor in tensors.items()
    }


def _offsets(header: bytes) -> dict[str, int]:
    """Offsets from the start of the file, by tensor name."""
    tree = cast("dict[str, dict[str, list[int]]]", json.loads(header))
    return {name: 8 + len(header) + entry["data_offsets"][0] for name, entry in tree.items() if name != "__metadata__"}


class ShardFiles:
    """Reads tensors from shards and keeps the most recently used files open. Thread-safe."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._handles: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    def tensor(self, shard: str, name: str, entry: TensorEntry) -> Tensor:
        """Reads and verifies one tensor.

        Raises:
            StoreError: the file is missing or truncated, or the tensor does not match its hash.
        """
        where = f"{self._directory / shard}: tensor '{name}'"
        dtype = _DTYPES.get(entry.dtype)
        sizes_make_sense = entry.offset >= 0 and min(entry.shape, default=1) > 0
        if dtype is None or not sizes_make_sense or math.prod(entry.shape) * dtype.itemsize != entry.size:
            raise StoreError(f"{where} has the invalid entry {entry.dtype} {list(entry.shape)} in {entry.size} bytes")
        content = self.read(shard, entry.offset, entry.size)
        if xxhash.xxh3_64_hexdigest(content) != entry.xxh3:
            raise StoreError(f"{where} does not match its xxh3: the file is damaged")
        return torch.frombuffer(content, dtype=dtype).reshape(entry.shape)

    def read(self, name: str, offset: int, size: int) -> bytearray:
        """Reads bytes of one of the store's files.

        Raises:
            StoreError: the file is missing, unreadable or too short.
        """
        if offset < 0 or size < 0:
            raise StoreError(f"{self._directory / name}: an index names {size} bytes at byte {offset}")
        try:
            with self._lock:
                handle = self._open(name)
                if offset + size > os.fstat(handle).st_size:
                    raise StoreError(f"{self._directory / name}: truncated: bytes up to {offset + size} are missing")
                content = bytearray(size)
                rest = memoryview(content)
                while rest:
                    count = os.preadv(handle, [rest], offset + size - len(rest))
                    if not count:
                        raise StoreError(f"{self._directory / name}: truncated while it was being read")
                    rest = rest[count:]
        except OSError as error:
            raise StoreError(f"{self._directory / name}: cannot read: {error}") from error
        return content

    def _open(self, name: str) -> int:
        handle = self._handles.get(name)
        if handle is None:
            if Path(name).name != name:
                raise StoreError(f"{self._directory}: a journal or index names '{name}', not a file of the store")
            handle = self._handles[name] = os.open(self._directory / name, os.O_RDONLY)
            if len(self._handles) > _OPEN_FILES:
                os.close(self._handles.popitem(last=False)[1])
        self._handles.move_to_end(name)
        return handle

    def close(self) -> None:
        """Closes the files; a later read opens its file again."""
        with self._lock:
            while self._handles:
                os.close(self._handles.popitem()[1])
