"""Writes a list of samples as one .pt file, sample by sample, with a few megabytes of memory.

The file has the format of `torch.save` for a list of dicts; `torch.load(path, weights_only=True)` reads it, also with
`mmap=True`. It is a zip archive with `data.pkl`, whose tensors are views of the storages `data/0`, `data/1`, ...
`torch.save` itself would need the whole list in memory.
"""

from __future__ import annotations

import io
import pickle  # noqa: TID251 - this writes the format of torch.save; nothing here reads a pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch._utils import _rebuild_tensor_v2

from kvcore.errors import StoreError
from kvcore.files import sync

Tensor = torch.Tensor

# Tensors of several samples share a storage of about this size, which keeps the archive's directory small.
CHUNK_BYTES = 16 << 20
_PROTOCOL = 2
# torch.save aligns storages to this many bytes for memory mapping.
_ALIGNMENT = 64
_LOCAL_HEADER_BYTES = 30
_STORAGE_CLASSES: dict[torch.dtype, type] = {
    torch.float32: torch.FloatStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int32: torch.IntStorage,
}


@dataclass(frozen=True, slots=True)
class _Storage:
    """A storage in the file: name, dtype and number of elements."""

    name: str
    dtype: torch.dtype
    elements: int


class PTWriter:
    """Context manager that writes a list item by item. The file appears when the block ends without an error.

    Args:
        path: path of the .pt file; an existing file is replaced.
        chunk_bytes: how much is buffered before it is written.

    Raises:
        StoreError: writing failed; an existing file at `path` is unchanged.
    """

    def __init__(self, path: Path, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._path = path
        self._temporary = path.with_name(path.name + ".tmp")
        self._pickle_path = path.with_name(path.name + ".list.tmp")
        self._root = path.stem
        self._chunk_bytes = chunk_bytes
        self._pending: list[Mapping[str, Any]] = []
        self._pending_bytes = 0
        self._storages = 0

    def __enter__(self) -> Self:
        with _disk_errors(self._path):
            self._archive = zipfile.ZipFile(self._temporary, "w", zipfile.ZIP_STORED)
            self._pickle = self._pickle_path.open("wb")
            self._pickle.write(pickle.PROTO + bytes([_PROTOCOL]) + pickle.EMPTY_LIST)
        return self

    def append(self, item: Mapping[str, Any]) -> None:
        """Adds an item: a dict of strings, numbers, lists, dicts, and CPU tensors of fp32, bf16 or int32."""
        self._pending.append(item)
        self._pending_bytes += sum(tensor.nbytes for tensor in _tensors(item))
        if self._pending_bytes >= self._chunk_bytes:
            self._flush()

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._archive.close()
            self._pickle.close()
            self._pickle_path.unlink(missing_ok=True)
            self._temporary.unlink(missing_ok=True)

    def _flush(self) -> None:
        """Writes the buffered tensors, one storage per dtype, and the items that view them."""
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for item in self._pending:
            for tensor in _tensors(item):
                by_dtype.setdefault(tensor.dtype, []).append(tensor)
        places: dict[int, tuple[_Storage, int]] = {}
        with _disk_errors(self._path):
            for dtype, tensors in by_dtype.items():
                places |= self._write_storage(dtype, tensors)
            for item in self._pending:
                self._pickle.write(_body(item, places) + pickle.APPEND)
        self._pending, self._pending_bytes = [], 0

    def _write_storage(self, dtype: torch.dtype, tensors: list[Tensor]) -> dict[int, tuple[_Storage, int]]:
        """Writes tensors as one storage; returns each tensor's storage and first element, by id."""
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        storage = _Storage(str(self._storages), dtype, flat.numel())
        self._storages += 1
        self._write(f"data/{storage.name}", flat.view(torch.uint8).numpy().data)
        places: dict[int, tuple[_Storage, int]] = {}
        start = 0
        for tensor in tensors:
            places[id(tensor)] = (storage, start)
            start += tensor.numel()
        return places

    def _write(self, name: str, content: bytes | memoryview) -> None:
        """Adds a member whose content is aligned."""
        entry = zipfile.ZipInfo(f"{self._root}/{name}")
        start = self._archive.start_dir + _LOCAL_HEADER_BYTES + len(entry.filename.encode())
        # The extra field has an id and a length of two bytes each, then padding.
        padding = -(start + 4) % _ALIGNMENT
        entry.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)
        entry.file_size = len(content)
        with self._archive.open(entry, "w") as member:
            member.write(content)

    def _finish(self) -> None:
        self._flush()
        with _disk_errors(self._path):
            self._pickle.write(pickle.STOP)
            self._pickle.close()
            self._archive.write(self._pickle_path, f"{self._root}/data.pkl")
            self._write("byteorder", b"little")
            self._write("version", b"3\n")
            self._archive.close()
            sync(self._temporary)
            self._temporary.replace(self._path)
            sync(self._path.parent)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Converts OSError to StoreError with the path."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"{path}: cannot write: {error}") from error


class _ItemPickler(pickle.Pickler):
    """Pickles one item; its tensors become views of storages that are already written."""

    def __init__(self, file: io.BytesIO, places: Mapping[int, tuple[_Storage, int]]) -> None:
        super().__init__(file, protocol=_PROTOCOL)
        self._places = places

    def persistent_id(self, obj: Any) -> tuple[str, type, str, str, int] | None:
        if not isinstance(obj, _Storage):
            return None
        return ("storage", _STORAGE_CLASSES[obj.dtype], obj.name, "cpu", obj.elements)

    def reducer_override(self, obj: Any) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
        if not isinstance(obj, Tensor):
            return NotImplemented
        storage, start = self._places[id(obj)]
        strides = torch.empty(obj.shape, device="meta").stride()
        return _rebuild_tensor_v2, (storage, start, tuple(obj.shape), strides, False, OrderedDict())


def _body(item: Mapping[str, Any], places: Mapping[int, tuple[_Storage, int]]) -> bytes:
    """The opcodes that push `item` on the unpickler's stack."""
    file = io.BytesIO()
    _ItemPickler(file, places).dump(item)
    return file.getvalue()[2:-1]


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in nested dicts and lists."""
    if isinstance(value, Tensor):
        return [value]
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return [tensor for part in inside for tensor in _tensors(part)]
