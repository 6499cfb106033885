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

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from kvcore.tensors.codec import Codec, PartLayout, group_dim, group_max, per_element, scale_shape
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
        """Bytes of so many codes in a row."""
        return -(-codes // self.per_word) * self.word_bytes

    def encode(self, x_BHMD: Tensor, kind: TensorKind, group_size: int) -> dict[str, Tensor]:
        """See `Codec.encode`."""
        parts: dict[str, Tensor] = {}
        if kind == "k":
            parts["mean"] = _mean(x_BHMD).to(torch.bfloat16)
            x_BHMD = x_BHMD - parts["mean"].float()
        dim = group_dim(kind)
        scale = (group_max(x_BHMD, group_size, dim) / self.levels).to(torch.bfloat16)
        divisor = torch.where(scale == 0, 1.0, scale.float())
        codes = x_BHMD / per_element(divisor, x_BHMD.shape[dim], group_size, dim)
        codes = codes.round_().clamp_(-self.levels, self.levels).add_(self.levels).to(torch.int32)
        return {"codes": self._pack(codes, _packed_dim(kind)), "scale": scale.contiguous()} | parts

    def decode(self, parts: Mapping[str, Tensor], kind: TensorKind, group_size: int) -> Tensor:
        """See `Codec.decode`."""
        scale, packed_dim, dim = parts["scale"].float(), _packed_dim(kind), group_dim(kind)
        codes = self._unpack(parts["codes"], packed_dim, scale.shape[packed_dim])
        x = (codes - self.levels).float().mul_(per_element(scale, codes.shape[dim], group_size, dim))
        return x.add_(parts["mean"].float()) if kind == "k" else x

    def layout(self, shape_HMD: tuple[int, int, int], kind: TensorKind, group_size: int) -> PartLayout:
        """See `Codec.layout`."""
        heads, _, head_dim = shape_HMD
        packed = list(shape_HMD)
        packed[_packed_dim(kind)] = self.packed_size(packed[_packed_dim(kind)])
        parts: PartLayout = [
            ("codes", torch.uint8, tuple(packed)),
            ("scale", torch.bfloat16, scale_shape(shape_HMD, kind, group_size)),
        ]
        return [*parts, ("mean", torch.bfloat16, (heads, 1, head_dim))] if kind == "k" else parts

    def _pack(self, codes: Tensor, dim: int) -> Tensor:
        codes = codes.transpose(dim, -1)
        codes = _in_rows(functional.pad(codes, (0, -codes.shape[-1] % self.per_word)), self.per_word)
        # The codes of a word do not overlap, so that their sum is the word.
        word = (codes << self._shifts(codes.device)).sum(dim=-1, dtype=torch.int32)
        packed = (word[..., None] >> _byte_shifts(self.word_bytes, codes.device)) & 0xFF
        return packed.flatten(-2).to(torch.uint8).transpose(dim, -1).contiguous()

    def _unpack(self, packed: Tensor, dim: int, size: int) -> Tensor:
        packed = _in_rows(packed.transpose(dim, -1), self.word_bytes).to(torch.int32)
        word = (packed << _byte_shifts(self.word_bytes, packed.device)).sum(dim=-1, dtype=torch.int32)
        codes = (word[..., None] >> self._shifts(packed.device)) & (2**self.bits - 1)
        return codes.flatten(-2)[..., :size].transpose(dim, -1)

    def _shifts(self, device: torch.device) -> Tensor:
        return self.bits * torch.arange(self.per_word, dtype=torch.int32, device=device)


def _codec(ints: PackedInts) -> Codec:
    return Codec(ints.encode, ints.decode, ints.layout)


INT6, INT4 = _codec(PackedInts(bits=6, per_word=4)), _codec(PackedInts(bits=4, per_word=2))


def _in_rows(x: Tensor, size: int) -> Tensor:
    """Divides the last dimension into rows of `size`."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)


def _packed_dim(kind: TensorKind) -> int:
    """The dimension along which codes are packed. It is not the one that is divided into groups."""
    return -1 if kind == "k" else -2


def _byte_shifts(count: int, device: torch.device) -> Tensor:
    return 8 * torch.arange(count, dtype=torch.int32, device=device)


def _mean(x_BHMD: Tensor) -> Tensor:
    """The mean over tokens, zero without tokens. Each value is divided first, so that the sum cannot overflow."""
    return (x_BHMD / max(1, x_BHMD.shape[-2])).sum(dim=-2, keepdim=True)
