"""The codecs `int6` and `int4`: codes of a few bits, packed into bytes.

Keys and values are grouped as in `int8`. Before that, each channel's mean over the selected tokens is subtracted from
keys, whose channels have large means, and sent beside the codes in bf16. A code q in 0 .. 2 * levels stands for
(q - levels) * scale, with 31 levels in int6 and 7 in int4.

Codes are packed along the dimension in which every element has a scale: channels for keys, tokens for values. Their
bytes are a little-endian stream of bits: code i has the bits from bits * i on. Zeros fill the last word, of 3 bytes in
int6 and one in int4.

Apart from rounding in fp32, |decoded - x| <= scale / 2 for every element whose group has a normal scale.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from kvcore.tensors.codec import Codec, PartLayout, group_dim, per_element, quantise, scale_shape
from kvcore.types import Tensor, TensorKind


@dataclass(frozen=True, slots=True)
class PackedInts:
    """Packs `per_word` codes of `bits` bits into words of whole bytes."""

    bits: int
    per_word: int

    @property
    def levels(self) -> int:
        """The largest magnitude of a code."""
        return 2 ** (self.bits - 1) - 1

    @property
    def word_bytes(self) -> int:
        """Bytes of a word."""
        return self.bits * self.per_word // 8

    def packed_size(self, codes: int) -> int:
        """Bytes of this number of codes in a row."""
        return -(-codes // self.per_word) * self.word_bytes

    def encode(self, x_BHMD: Tensor, kind: TensorKind, group_size: int) -> dict[str, Tensor]:
        """See `Codec.encode`."""
        parts: dict[str, Tensor] = {}
        if kind == "k":
            parts["mean"] = _mean(x_BHMD).to(torch.bfloat16)
            x_BHMD = x_BHMD - parts["mean"].float()
        codes, scale = quantise(x_BHMD, kind, group_size, self.levels)
        packed = self._pack(codes.add_(self.levels).to(torch.uint8), _packed_dim(kind))
        return {"codes": packed, "scale": scale} | parts

    def decode(self, parts: Mapping[str, Tensor], kind: TensorKind, group_size: int) -> Tensor:
        """See `Codec.decode`."""
        scale, packed_dim, dim = parts["scale"].float(), _packed_dim(kind), group_dim(kind)
        codes = self._unpack(parts["codes"], packed_dim, scale.shape[packed_dim])
        x = codes.float().sub_(self.levels).mul_(per_element(scale, codes.shape[dim], group_size, dim))
        return x.add_(parts["mean"].float()) if kind == "k" else x

    def layout(self, shape_HMD: tuple[int, int, int], kind: TensorKind, group_size: int) -> PartLayout:
        """See `Codec.layout`."""
        heads, _, head_dim = shape_HMD
        packed, dim = list(shape_HMD), _packed_dim(kind)
        packed[dim] = self.packed_size(packed[dim])
        parts: PartLayout = [
            ("codes", torch.uint8, tuple(packed)),
            ("scale", torch.bfloat16, scale_shape(shape_HMD, kind, group_size)),
        ]
        return [*parts, ("mean", torch.bfloat16, (heads, 1, head_dim))] if kind == "k" else parts

    def _pack(self, codes: Tensor, dim: int) -> Tensor:
        missing = -codes.shape[dim] % self.per_word
        codes = functional.pad(codes, (0, missing) if dim == -1 else (0, 0, 0, missing))
        by_code = _in_rows(codes, dim, self.per_word).unbind(dim)
        packed = [
            _any_of(_shifted(by_code[code], self.bits * code - 8 * byte) for code in self._codes_in(byte))
            for byte in range(self.word_bytes)
        ]
        return torch.stack(packed, dim=dim).reshape(_with_size(codes, dim, self.packed_size(codes.shape[dim])))

    def _unpack(self, packed: Tensor, dim: int, size: int) -> Tensor:
        by_byte = _in_rows(packed, dim, self.word_bytes).unbind(dim)
        codes = [
            _any_of(
                _shifted(by_byte[byte], 8 * byte - self.bits * code)
                for byte in range(self.word_bytes)
                if code in self._codes_in(byte)
            )
            & (2**self.bits - 1)
            for code in range(self.per_word)
        ]
        whole = packed.shape[dim] // self.word_bytes * self.per_word
        return torch.stack(codes, dim=dim).reshape(_with_size(packed, dim, whole)).narrow(dim, 0, size)

    def _codes_in(self, byte: int) -> range:
        """The codes of a word that have bits in one of its bytes."""
        return range(8 * byte // self.bits, -(-8 * (byte + 1) // self.bits))


def _codec(ints: PackedInts) -> Codec:
    return Codec(ints.encode, ints.decode, ints.layout)


INT6, INT4 = _codec(PackedInts(bits=6, per_word=4)), _codec(PackedInts(bits=4, per_word=2))


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shifts uint8 to the left, or to the right if `bits` is negative. What leaves the byte is lost."""
    return x << bits if bits >= 0 else x >> -bits


def _any_of(parts: Iterable[Tensor]) -> Tensor:
    """The bits that are set in any part."""
    return functools.reduce(torch.bitwise_or, parts)


def _in_rows(x: Tensor, dim: int, size: int) -> Tensor:
    """Divides dimension `dim`, the last or the one before, into rows of `size`, which becomes dimension `dim`."""
    at = x.ndim + dim
    return x.reshape(*x.shape[:at], x.shape[at] // size, size, *x.shape[at + 1 :])


def _with_size(x: Tensor, dim: int, size: int) -> list[int]:
    """The shape of x with another size of one dimension."""
    shape = list(x.shape)
    shape[dim] = size
    return shape


def _packed_dim(kind: TensorKind) -> int:
    """The dimension along which codes are packed. It is not the one that is divided into groups."""
    return -1 if kind == "k" else -2


def _mean(x_BHMD: Tensor) -> Tensor:
    """The mean over tokens, zero without tokens. Each value is divided first, so that the sum cannot overflow."""
    return (x_BHMD / max(1, x_BHMD.shape[-2])).sum(dim=-2, keepdim=True)
