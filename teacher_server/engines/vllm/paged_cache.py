"""Reads tokens' keys and values from vLLM's paged cache.

vLLM 0.32 gives every layer one tensor, nominally [blocks, heads, block_size, 2D]. Supported layouts:

- Split (FlashAttention, Triton): the first D of the last dimension are the key, the rest the value.
- Packed (CPU): per block and head, the first block_size * D elements are the keys and the rest the values, each in an
  order that depends on the processor's instruction set. It is recovered by having vLLM write numbered elements.

Other layouts are refused: reading them by these rules would scramble keys and values without an error.
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
# All cache dtypes represent integers below this exactly.
_DIGIT = 128

WriteTokens = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
"""vLLM's write to a cache: key and value [T,H,D], key and value cache [blocks,H,block_size,D], slots [T]."""


ReadTokens = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Takes a layer's cache; returns copies of the rotated keys and the values [N,H,D] of the chosen tokens."""


class CacheLayout(Protocol):
    """The cache layout of all layers."""

    def reader(self, block_N: Tensor, offset_N: Tensor) -> ReadTokens:
        """A function that reads the tokens at these blocks and offsets from any layer's cache."""
        ...


@dataclass(frozen=True, slots=True)
class SplitLayout:
    """Key and value of a token are adjacent."""

    head_dim: int

    def reader(self, block_N: Tensor, offset_N: Tensor) -> ReadTokens:
        """See `CacheLayout.reader`."""

        def read(cache: Tensor) -> tuple[Tensor, Tensor]:
            kv_NHF = cache[block_N, :, offset_N]
            return kv_NHF[..., : self.head_dim], kv_NHF[..., self.head_dim :]

        return read


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Keys and values of a block are separate and permuted: element indices [block_size, D] in a block of one head."""

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
    """Determine the layout of a layer's cache.

    Args:
        backend: the name of vLLM's attention backend.
        cache: the layer's cache.
        geometry: `kv_heads`, `block_size` and `head_dim` that the model and the cache were configured with.
        write: vLLM's function that writes to a cache, for layouts that are recovered with it.

    Raises:
        UnsupportedModelError: the backend, shape or dtype is not supported.
    """
    expected = (geometry["kv_heads"], geometry["block_size"], 2 * geometry["head_dim"])
    if cache.dim() != 4 or tuple(cache.shape[1:]) != expected:
        raise UnsupportedModelError(
            f"vLLM's cache has the shape {tuple(cache.shape)}; expected is [blocks, kv_heads, block_size, 2 head_dim], "
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
        f"the cache layout of vLLM's attention backend '{backend}' is not supported; supported: "
        f"{', '.join(SPLIT_BACKENDS + PACKED_BACKENDS)} (vllm_args: attention_backend)"
    )


def recover_packing(write: WriteTokens, cache: Tensor) -> PackedLayout:
    """Recover where vLLM puts each element of a block: write the elements' numbers, digit by digit, to a scratch block.

    Raises:
        UnsupportedModelError: the result is not a permutation of the elements.
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
