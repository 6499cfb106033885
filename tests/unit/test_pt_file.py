"""Tests of PTWriter: the same content as torch.save, written in one pass with constant memory."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from extraction import pt_file
from extraction.pt_file import PTWriter
from kvcore.errors import StoreError


def item(number: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(number)
    tokens = number % 4
    return {
        "example_id": f"é{number}",
        "none": None,
        "teacher_kvs": [
            {
                "teacher": name,
                "keys": torch.randn(3, 2, tokens, 4, generator=generator).to(dtype),
                "values": torch.randn(3, tokens, 2, 4, generator=generator).to(dtype).transpose(1, 2),
                "positions": torch.arange(tokens, dtype=torch.int32),
                "seq_len": 2**40 + number,
            }
            for name, dtype in (("a", torch.bfloat16), ("b", torch.float32))
        ],
    }


def write(path: Path, count: int, **options: Any) -> None:
    with PTWriter(path, **options) as file:
        for number in range(count):
            file.append(item(number))


def write_then(path: Path, last: Callable[[PTWriter], None]) -> None:
    with PTWriter(path, chunk_bytes=1) as file:
        file.append(item(1))
        last(file)


def interrupt(_file: PTWriter) -> None:
    raise KeyboardInterrupt


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for name in expected:
            assert_same(found[name], expected[name])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1, 700, pt_file.CHUNK_BYTES])
def test_torch_load_reads_the_same_list_as_from_torch_save(tmp_path: Path, chunk_bytes: int, mmap: bool) -> None:
    write(tmp_path / "x.pt", 7, chunk_bytes=chunk_bytes)
    found = torch.load(tmp_path / "x.pt", weights_only=True, mmap=mmap)  # noqa: TID251 - what users read it with
    saved = io.BytesIO()
    torch.save([item(number) for number in range(7)], saved)  # noqa: TID251 - the reference
    saved.seek(0)
    assert_same(found, torch.load(saved, weights_only=True))  # noqa: TID251 - as above
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_empty_list_can_be_loaded(tmp_path: Path) -> None:
    write(tmp_path / "x.pt", 0)
    assert torch.load(tmp_path / "x.pt", weights_only=True) == []  # noqa: TID251 - what users read it with


def test_storages_are_aligned_for_memory_mapping(tmp_path: Path) -> None:
    write(tmp_path / "x.pt", 9, chunk_bytes=300)
    found = torch.load(tmp_path / "x.pt", weights_only=True, mmap=True)  # noqa: TID251 - what users read it with
    starts = {entry["keys"].untyped_storage().data_ptr() for one in found for entry in one["teacher_kvs"]}
    assert len(starts) > 2
    assert all(start % 64 == 0 for start in starts)


def test_output_is_deterministic(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "x.pt", 3)
    assert (tmp_path / "one" / "x.pt").read_bytes() == (tmp_path / "two" / "x.pt").read_bytes()


def test_error_keeps_existing_file(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(b"before")
    with pytest.raises(TypeError, match="generator"):
        write_then(path, lambda file: file.append({"what no file can hold": (number for number in range(3))}))
    with pytest.raises(KeyboardInterrupt):
        write_then(path, interrupt)
    assert path.read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_write_error_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match="nowhere"), PTWriter(tmp_path / "nowhere" / "x.pt"):
        raise AssertionError("entered")

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        write(tmp_path / "x.pt", 3)
    assert list(tmp_path.iterdir()) == []


def test_memory_does_not_grow_with_the_number_of_items(tmp_path: Path) -> None:
    process = psutil.Process()
    with PTWriter(tmp_path / "x.pt") as file:
        file.append({"keys": torch.zeros(4 << 20)})
        before = most = process.memory_info().rss
        for number in range(15):
            file.append({"keys": torch.full((4 << 20,), float(number))})
            most = max(most, process.memory_info().rss)
    assert (tmp_path / "x.pt").stat().st_size > 250e6
    assert most - before < 120e6
