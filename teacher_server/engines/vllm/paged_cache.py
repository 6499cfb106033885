"""Where a token's keys and values lie in vLLM's paged cache.

vLLM 0.32 gives every layer one tensor, nominally [blocks, heads, block_size, 2D]. The layouts known here:

- Split (FlashAttention, Triton): the first D of the last dimension are the key, the rest the value.
- Packed (CPU): per block and head, the first block_size * D elements are the keys and the rest the values, each in an
  order that depends on the processor's instruction set. It is recovered by having vLLM write numbers.

What is not known is refused: read by another layout's rules, keys and values would be scrambled without a sign.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from kvcore.errors import UnsupportedModelError
from kvcore.types import Tensor

SPLIT_BACKENDS = ("FLASH_ATTN", "TRITON_ATTN")
PACKED_BACKENDS = ("CPU_ATTN",)
# Every dtype of a cache holds these numbers exactly.
_DIGIT = 128

WriteTokens = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
"""vLLM's own writing into a cache: key and value [T,H,D], key and value cache [blocks,H,block_size,D], slots [T]."""


ReadTokens = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From a layer's cache to copies of the rotated keys and the values [N,H,D] of certain tokens."""


class CacheLayout(Protocol):
    """Where the tokens of any layer lie."""

    def reader(self, block_N: Tensor, offset_N: Tensor) -> ReadTokens:
        """Reads tokens, given by their block and their place in it, out of every layer's cache."""
        ...


@dataclass(frozen=True, slots=True)
class SplitLayout:
    """Key and value of a token side by side."""

    head_dim: int

    def reader(self, block_N: Tensor, offset_N: Tensor) -> ReadTokens:
        """See `CacheLayout.reader`."""

        def read(cache: Tensor) -> tuple[Tensor, Tensor]:
            kv_NHF = cache[block_N, :, offset_N]
            return kv_NHF[..., : self.head_dim], kv_NHF[..., self.head_dim :]

        return read


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Keys and values of a block apart, elements permuted: places [block_size, D] within a block of one head."""

    heads: int
    key_places: Tensor
    value_places: Tensor

    def reader(self, block_N: Tensor, offset_N: Tensor) -> ReadTokens:
        """See `CacheLayout.reader`."""
        elements = 2 * self.key_places.numel()
        start_NH1 = ((block_N[:, None] * self.heads + torch.arange(self.heads)) * elements)[..., None]
        key_index_NHD = start_NH1 + self.key_places[offset_N][:, None]
        value_index_NHD = start_NH1 + self.value_places[offset_N][:, None]
        return lambda cache: (cache.take(key_index_NHD), cache.take(value_index_NHD))


def layout_of(backend: str, cache: Tensor, geometry: Mapping[str, int], write: WriteTokens | None) -> CacheLayout:
    """How to read a layer's cache.

    Args:
        backend: the name of vLLM's attention backend.
        cache: the layer's cache.
        geometry: `kv_heads`, `block_size` and `head_dim` that the model and the cache were configured with.
        write: vLLM's writing, for layouts that are recovered.

    Raises:
        UnsupportedModelError: a backend, shape or dtype that is not known.
    """
    expected = (geometry["kv_heads"], geometry["block_size"], 2 * geometry["head_dim"])
    if cache.dim() != 4 or tuple(cache.shape[1:]) != expected:
        raise UnsupportedModelError(
            f"vLLM's cache has the shape {tuple(cache.shape)}; known is [blocks, kv_heads, block_size, 2 head_dim], "
            f"here [*, {', '.join(map(str, expected))}]"
        )
    if cache.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UnsupportedModelError(
            f"vLLM's cache holds {cache.dtype}; keys and values are read from fp32, bf16 and fp16 (kv_cache_dtype=auto)"
        )
    if backend in SPLIT_BACKENDS:
        return SplitLayout(geometry["head_dim"])
    if backend in PACKED_BACKENDS and write is not None and cache.is_contiguous():
        return recover_packing(write, cache)
    raise UnsupportedModelError(
        f"vLLM's attention backend '{backend}' lays its cache out in a way that is not known; known: "
        f"{', '.join(SPLIT_BACKENDS + PACKED_BACKENDS)} (vllm_args: attention_backend)"
    )


def recover_packing(write: WriteTokens, cache: Tensor) -> PackedLayout:
    """Finds out where each element of a block goes, by writing its number, digit by digit, into a block of its own.

    Raises:
        UnsupportedModelError: what was written is no permutation of the elements.
    """
    heads, block_size, head_dim = cache.shape[1], cache.shape[2], cache.shape[3] // 2
    count = block_size * head_dim
    numbers_TD = torch.arange(count).view(block_size, head_dim)
    found = torch.zeros(2, count, dtype=torch.int64)
    scale = 1
    while scale < count:
        digit_T1D = (numbers_TD // scale % _DIGIT).to(cache.dtype)[:, None]
        scratch = torch.zeros(1, 1, 2 * block_size, head_dim, dtype=cache.dtype)
        key_cache, value_cache = scratch.chunk(2, dim=2)
        write(digit_T1D, digit_T1D.clone(), key_cache, value_cache, torch.arange(block_size))
        found += scratch.flatten().view(2, count).round().long() * scale
        scale *= _DIGIT
    if not torch.equal(found.sort(dim=1).values, torch.arange(count).expand(2, -1)):
        raise UnsupportedModelError("vLLM's CPU cache does not hold each element of a block once")
    key_places, value_places = (row.argsort().view(block_size, head_dim) for row in found)
    return PackedLayout(heads, key_places, value_places + count)
