"""Tests of reading exact keys and values from vLLM's cache, and of refusing unsupported layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvcore.errors import UnsupportedModelError
from kvcore.types import Tensor
from teacher_server.engines.vllm.paged_cache import (
    PackedLayout,
    SplitLayout,
    WriteTokens,
    layout_of,
    recover_packing,
)

BLOCKS, HEADS, BLOCK_SIZE, DIM = 5, 3, 8, 16
GEOMETRY = {"kv_heads": HEADS, "block_size": BLOCK_SIZE, "head_dim": DIM}
# Covers unordered blocks, a repeated block, and the first and last offsets.
BLOCK_N = torch.tensor([4, 0, 2, 2, 4, 1])
OFFSET_N = torch.tensor([7, 0, 3, 5, 0, 7])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def numbered(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers that every dtype represents exactly."""
    return torch.randint(-100, 100, (count,), generator=torch.Generator().manual_seed(1)).to(dtype)


def token_major() -> Tensor:
    """[blocks, heads, block_size, 2D] whose memory order is NHD: the heads of a token are adjacent."""
    return numbered(BLOCKS * BLOCK_SIZE * HEADS * 2 * DIM).view(BLOCKS, BLOCK_SIZE, HEADS, 2 * DIM).transpose(1, 2)


def head_major() -> Tensor:
    """[blocks, heads, block_size, 2D] whose memory order is HND: the tokens of a head are adjacent."""
    return numbered(BLOCKS * BLOCK_SIZE * HEADS * 2 * DIM).view(BLOCKS, HEADS, BLOCK_SIZE, 2 * DIM)


def part_of_all_layers() -> Tensor:
    """The cache of one of two layers whose blocks alternate in memory."""
    both = numbered(2 * BLOCKS * BLOCK_SIZE * HEADS * 2 * DIM).view(BLOCKS, 2, HEADS, BLOCK_SIZE, 2 * DIM)
    return both[:, 1]


@pytest.mark.parametrize("backend", ["FLASH_ATTN", "TRITON_ATTN"])
@pytest.mark.parametrize("make_cache", [token_major, head_major, part_of_all_layers])
def test_split_caches_are_read_token_by_token(make_cache: Callable[[], Tensor], backend: str) -> None:
    cache = make_cache()
    k_NHD, v_NHD = layout_of(backend, cache, GEOMETRY, None).reader(BLOCK_N, OFFSET_N)(cache)
    assert k_NHD.shape == v_NHD.shape == (len(BLOCK_N), HEADS, DIM)
    storage, strides = cache.untyped_storage(), cache.stride()
    memory = torch.empty(0).set_(storage)
    for n, (block, offset) in enumerate(zip(BLOCK_N.tolist(), OFFSET_N.tolist(), strict=True)):
        for head in range(HEADS):
            start = cache.storage_offset() + block * strides[0] + head * strides[1] + offset * strides[2]
            assert k_NHD[n, head].tolist() == memory[start : start + DIM].tolist()
            assert v_NHD[n, head].tolist() == memory[start + DIM : start + 2 * DIM].tolist()


@pytest.mark.parametrize("backend", ["FLASH_ATTN", "CPU_ATTN"])
def test_read_tensors_are_copies(backend: str) -> None:
    cache = head_major()
    k_NHD, v_NHD = layout_of(backend, cache, GEOMETRY, writer(in_order)).reader(BLOCK_N, OFFSET_N)(cache)
    before = (k_NHD.clone(), v_NHD.clone())
    cache.zero_()
    assert torch.equal(k_NHD, before[0])
    assert torch.equal(v_NHD, before[1])


# ---------------------------------------------------------------------------------------------------- packed

Places = Callable[[int, int], Tensor]
"""From block size and head dimension to the place of each element, a permutation [block_size, D]."""


def in_order(block_size: int, head_dim: int) -> Tensor:
    return torch.arange(block_size * head_dim).view(block_size, head_dim)


def transposed(block_size: int, head_dim: int) -> Tensor:
    """A block of keys as [D, block_size]."""
    return torch.arange(block_size * head_dim).view(head_dim, block_size).T


def in_pairs(block_size: int, head_dim: int) -> Tensor:
    """The elements of two tokens alternate, as for instructions on bf16 pairs."""
    return torch.arange(block_size * head_dim).view(block_size // 2, head_dim, 2).transpose(1, 2).reshape(-1, head_dim)


def at_random(block_size: int, head_dim: int) -> Tensor:
    return torch.randperm(block_size * head_dim, generator=torch.Generator().manual_seed(5)).view(block_size, head_dim)


def writer(key_places: Places, value_places: Places | None = None) -> WriteTokens:
    """Returns vLLM's write function of a processor with this element order."""

    def write(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
        block_size, head_dim = key_cache.shape[2:]
        for x_THD, cache, places in ((key, key_cache, key_places), (value, value_cache, value_places or key_places)):
            place_bD = places(block_size, head_dim)
            for token, slot in enumerate(slots.tolist()):
                for head in range(x_THD.shape[1]):
                    block = cache[slot // block_size, head].view(-1)
                    block[place_bD[slot % block_size]] = x_THD[token, head]

    return write


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "places",
    [(in_order, in_order), (transposed, in_order), (in_order, in_pairs), (in_pairs, transposed), (at_random, in_pairs)],
    ids=lambda pair: "-".join(one.__name__ for one in pair),
)
def test_packed_caches_are_read_exactly(places: tuple[Places, Places], dtype: torch.dtype) -> None:
    # 32 x 64 elements exceed the integers that bf16 represents exactly, so recovery needs more than one digit.
    block_size, head_dim = 32, 64
    cache = torch.zeros(BLOCKS, HEADS, block_size, 2 * head_dim, dtype=dtype)
    write = writer(*places)
    slots = torch.randperm(BLOCKS * block_size, generator=torch.Generator().manual_seed(2))[:20]
    key, value = (numbered(2 * 20 * HEADS * head_dim, dtype).view(2, 20, HEADS, head_dim) + 0).unbind()
    keys, values = cache.view(BLOCKS, HEADS, 2 * block_size, head_dim).chunk(2, dim=2)
    write(key, value, keys, values, slots)
    geometry = {"kv_heads": HEADS, "block_size": block_size, "head_dim": head_dim}
    layout = layout_of("CPU_ATTN", cache, geometry, write)
    assert isinstance(layout, PackedLayout)
    k_NHD, v_NHD = layout.reader(slots // block_size, slots % block_size)(cache)
    assert torch.equal(k_NHD, key)
    assert torch.equal(v_NHD, value)


def writes_nothing(*_: Tensor) -> None:
    pass


def writes_only_the_first_token(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    writer(in_order)(key[:1], value[:1], keys, values, slots[:1])


def loses_values(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    writer(in_order)(key, value.clamp(max=3), keys, values, slots)


def quantises(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    writer(in_order)(key // 2 * 2, value, keys, values, slots)


@pytest.mark.parametrize("write", [writes_nothing, writes_only_the_first_token, loses_values, quantises])
def test_packing_that_is_not_a_permutation_is_refused(write: WriteTokens) -> None:
    with pytest.raises(UnsupportedModelError, match="does not hold each element of a block once"):
        recover_packing(write, torch.zeros(1, HEADS, BLOCK_SIZE, 2 * DIM))


# ---------------------------------------------------------------------------------------------------- refused

CACHE = torch.zeros(BLOCKS, HEADS, BLOCK_SIZE, 2 * DIM)


@pytest.mark.parametrize(
    ("backend", "cache", "reason"),
    [
        ("FLASHINFER", CACHE, "backend 'FLASHINFER' is not supported"),
        ("FLASH_ATTN", CACHE.view(BLOCKS, HEADS, BLOCK_SIZE, 2, DIM), r"has the shape \(5, 3, 8, 2, 16\)"),
        ("FLASH_ATTN", torch.zeros(2, BLOCKS, BLOCK_SIZE, HEADS, DIM), "has the shape"),
        ("FLASH_ATTN", torch.zeros(BLOCKS, BLOCK_SIZE, HEADS, 2 * DIM), r"here \[\*, 3, 8, 32\]"),
        ("TRITON_ATTN", torch.zeros(BLOCKS, HEADS, BLOCK_SIZE, DIM), "has the shape"),
        ("CPU_ATTN", torch.zeros(BLOCKS, HEADS + 1, BLOCK_SIZE, 2 * DIM), "has the shape"),
        ("FLASH_ATTN", CACHE.to(torch.float8_e4m3fn), "holds torch.float8_e4m3fn"),
        ("FLASH_ATTN", CACHE.to(torch.uint8), "holds torch.uint8"),
        (
            "CPU_ATTN",
            CACHE.transpose(1, 2).contiguous().transpose(1, 2),
            "not supported; supported: FLASH_ATTN, TRITON_ATTN",
        ),
    ],
)
def test_unsupported_caches_are_refused(backend: str, cache: Tensor, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        layout_of(backend, cache, GEOMETRY, writer(in_order))


def test_packed_cache_needs_vllms_write_function() -> None:
    with pytest.raises(UnsupportedModelError, match="CPU_ATTN"):
        layout_of("CPU_ATTN", CACHE, GEOMETRY, None)


def test_layout_of_each_backend() -> None:
    kinds: dict[str, type[Any]] = {"FLASH_ATTN": SplitLayout, "TRITON_ATTN": SplitLayout, "CPU_ATTN": PackedLayout}
    for backend, kind in kinds.items():
        assert isinstance(layout_of(backend, CACHE, GEOMETRY, writer(in_order)), kind)
