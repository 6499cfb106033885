"""Encodes K/V for the network and for stores: `raw` (fp32), `bf16`, `int8` (symmetric, bfloat16 scales).

`int6` and `int4` are in packed_codec.py. `pca` rounds what a coded map (kv_map.py) makes of K/V.

In int8, keys have one scale per channel and group of `group_size` tokens, because keys have outlier channels; values
have one scale per token and group of `group_size` channels. The last group may be shorter. Codes are computed with the
rounded scale, so |decoded - x| <= scale / 2 for every element whose group has a normal scale (largest magnitude at
least 127 * 2^-126); a group of zeros has scale 0 and decodes to exact zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.nn import functional

from kvcore.errors import NonFiniteError
from kvcore.plan import CODECS, CodecSpec
from kvcore.tensors.kv_map import KVMap
from kvcore.tensors.packed_sample import unpacked
from kvcore.types import TENSORS, BatchKV, EncodedSampleKV, Tensor, TensorKind

PartLayout = list[tuple[str, torch.dtype, tuple[int, ...]]]

# The dtypes that parts may have.
PART_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16, torch.float32)

_LEVELS = 127
_INT16_MAX = 2**15 - 1


@dataclass(frozen=True, slots=True)
class Codec:
    """A way to encode keys or values.

    `encode(x_BHMD, kind, group_size)` encodes fp32 on its device. It returns the parts that `layout` lists, each with a
    leading B. `decode(parts, kind, group_size)` returns fp32 and keeps the leading dimensions of the parts.
    `layout(shape_HMD, kind, group_size)` lists name, dtype (one of `PART_DTYPES`) and shape of each part of one layer
    of one sample. The number of bytes follows from it.
    """

    encode: Callable[[Tensor, TensorKind, int], dict[str, Tensor]]
    decode: Callable[[Mapping[str, Tensor], TensorKind, int], Tensor]
    layout: Callable[[tuple[int, int, int], TensorKind, int], PartLayout]


@dataclass(frozen=True, slots=True)
class Encoded:
    """An encoded tensor. `relative_error_B`: ||decoded - x|| / ||x|| of each batch item, fp64, 0 where x is 0."""

    parts: dict[str, Tensor]
    relative_error_B: Tensor


def encode(x_BHMD: Tensor, kind: TensorKind, spec: CodecSpec) -> Encoded:
    """Encodes keys or values on their device.

    Returns:
        Parts as `part_layout` lists them, with a leading B, and the error measured by decoding them again.

    Raises:
        NonFiniteError: x holds NaN, infinity, or a value too large for the codec.
    """
    x_BHMD = x_BHMD.float()
    parts = _codec(spec).encode(x_BHMD, kind, spec.group_size)
    return Encoded(parts, _relative_error(x_BHMD, decode(parts, kind, spec)))


def decode(parts: Mapping[str, Tensor], kind: TensorKind, spec: CodecSpec) -> Tensor:
    """Decodes parts to fp32; leading dimensions of the parts are kept."""
    return _codec(spec).decode(parts, kind, spec.group_size)


def part_layout(spec: CodecSpec, kind: TensorKind, heads: int, slots: int, head_dim: int) -> PartLayout:
    """Name, dtype and shape of each part of one layer of one sample; names are without the prefix `k.` or `v.`."""
    return _codec(spec).layout((heads, slots, head_dim), kind, spec.group_size)


def layer_bytes(spec: CodecSpec, heads: int, slots: int, head_dim: int) -> int:
    """Bytes of the encoded keys and values of one layer of one sample."""
    parts = [part for kind in TENSORS for part in part_layout(spec, kind, heads, slots, head_dim)]
    return sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in parts)


def decode_batch(samples: Sequence[EncodedSampleKV]) -> BatchKV:
    """Decodes samples of one teacher and plan into one batch, padded to the largest M.

    `byte_ends_BLHM` is int64, -1 in slots without a token.
    """
    assert samples, "a batch holds at least one sample"
    kv_map = samples[0].kv_map
    if kv_map is not None:
        samples = [unpacked(sample) for sample in samples]
    first = samples[0]
    assert all((s.codec, s.layers, s.parts.keys()) == (first.codec, first.layers, first.parts.keys()) for s in samples)
    rows_by_slots: dict[int, list[int]] = {}
    for row, sample in enumerate(samples):
        rows_by_slots.setdefault(sample.slots, []).append(row)
    slots_B = torch.tensor([sample.slots for sample in samples])
    return BatchKV(
        k_BLHMD=_decode_kind(samples, rows_by_slots, "k", kv_map),
        v_BLHMD=_decode_kind(samples, rows_by_slots, "v", kv_map),
        mask_BM=torch.arange(max(rows_by_slots)) < slots_B[:, None],
        byte_ends_BLHM=_byte_ends(samples, rows_by_slots),
    )


def _codec(spec: CodecSpec) -> Codec:
    return CODECS.load(spec.name, Codec)


def _cast(dtype: torch.dtype) -> Codec:
    """The codec that only changes the dtype."""
    return Codec(
        encode=lambda x_BHMD, _kind, _group_size: {"data": x_BHMD.to(dtype).contiguous()},
        decode=lambda parts, _kind, _group_size: parts["data"].float(),
        layout=lambda shape_HMD, _kind, _group_size: [("data", dtype, shape_HMD)],
    )


def quantise(x_BHMD: Tensor, kind: TensorKind, group_size: int, levels: int) -> tuple[Tensor, Tensor]:
    """Codes from -levels to levels, in fp32, and the scale of each group in bfloat16."""
    dim = group_dim(kind)
    scale = (_group_max(x_BHMD, group_size, dim) / levels).to(torch.bfloat16)
    divisor = torch.where(scale == 0, 1.0, scale.float())
    codes = x_BHMD / per_element(divisor, x_BHMD.shape[dim], group_size, dim)
    return codes.round_().clamp_(-levels, levels), scale.contiguous()


def _encode_int8(x_BHMD: Tensor, kind: TensorKind, group_size: int) -> dict[str, Tensor]:
    codes, scale = quantise(x_BHMD, kind, group_size, _LEVELS)
    return {"codes": codes.to(torch.int8).contiguous(), "scale": scale}


def _decode_int8(parts: Mapping[str, Tensor], kind: TensorKind, group_size: int) -> Tensor:
    dim = group_dim(kind)
    codes, scale = parts["codes"], parts["scale"].float()
    return codes.float().mul_(per_element(scale, codes.shape[dim], group_size, dim))


def _int8_layout(shape_HMD: tuple[int, int, int], kind: TensorKind, group_size: int) -> PartLayout:
    return [("codes", torch.int8, shape_HMD), ("scale", torch.bfloat16, scale_shape(shape_HMD, kind, group_size))]


def _rounded(x_BHMD: Tensor) -> dict[str, Tensor]:
    """The nearest whole numbers of 16 bits.

    Raises:
        NonFiniteError: a number is NaN or does not fit.
    """
    fits_B = (x_BHMD.abs() <= _INT16_MAX).flatten(1).all(dim=1)
    if not bool(fits_B.all()):
        raise NonFiniteError("a key or value", cast("Any", fits_B).tolist())
    return {"codes": x_BHMD.round().to(torch.int16).contiguous()}


PCA = Codec(
    encode=lambda x_BHMD, _kind, _group_size: _rounded(x_BHMD),
    decode=lambda parts, _kind, _group_size: parts["codes"].float(),
    layout=lambda shape_HMD, _kind, _group_size: [("codes", torch.int16, shape_HMD)],
)
RAW, BF16 = _cast(torch.float32), _cast(torch.bfloat16)
INT8 = Codec(_encode_int8, _decode_int8, _int8_layout)


def group_dim(kind: TensorKind) -> int:
    """The dimension that is divided into groups: tokens for keys, channels for values."""
    return -2 if kind == "k" else -1


def scale_shape(shape_HMD: tuple[int, int, int], kind: TensorKind, group_size: int) -> tuple[int, int, int]:
    """The shape of the scales of one layer of one sample: one per group, channel and head, or per token."""
    heads, slots, head_dim = shape_HMD
    groups = -(-shape_HMD[group_dim(kind)] // group_size)
    return (heads, groups, head_dim) if kind == "k" else (heads, slots, groups)


def _group_max(x: Tensor, group_size: int, dim: int) -> Tensor:
    """The largest magnitude of each group along `dim`; the last group may be shorter."""
    size = x.shape[dim]
    group = max(1, min(group_size, size))
    groups = -(-size // group)
    magnitude = x.abs()
    short = groups * group - size
    if short:
        magnitude = functional.pad(magnitude, (0, short) if dim == -1 else (0, 0, 0, short))
    shape = list(magnitude.shape)
    shape[dim : dim + 1 or None] = [groups, group]
    return magnitude.reshape(shape).amax(dim=dim)


def per_element(scale: Tensor, size: int, group_size: int, dim: int) -> Tensor:
    """Repeats each group's scale for its elements along `dim`; a single group broadcasts."""
    if scale.shape[dim] == 1:
        return scale
    return scale.repeat_interleave(group_size, dim=dim).narrow(dim, 0, size)


def _relative_error(x_BHMD: Tensor, decoded_BHMD: Tensor) -> Tensor:
    # fp64, because squares of fp32 overflow and underflow.
    norm_B = x_BHMD.flatten(1).double().square().sum(dim=1).sqrt()
    error_B = (decoded_BHMD - x_BHMD).flatten(1).double().square().sum(dim=1).sqrt()
    relative_B = torch.where(norm_B == 0, error_B, error_B / norm_B)
    finite: list[bool] = cast("Any", relative_B.isfinite()).tolist()
    if not all(finite):
        raise NonFiniteError("a key or value", finite)
    return relative_B


def _decode_kind(
    samples: Sequence[EncodedSampleKV], rows_by_slots: dict[int, list[int]], kind: TensorKind, kv_map: KVMap | None
) -> Tensor:
    names = [name.removeprefix(f"{kind}.") for name in samples[0].parts if name.startswith(f"{kind}.")]
    decoded: list[Tensor] = []
    for rows in rows_by_slots.values():
        parts = {name: torch.stack([samples[row].parts[f"{kind}.{name}"] for row in rows]) for name in names}
        x_BLHMD = decode(parts, kind, samples[0].codec)
        decoded.append(x_BLHMD if kv_map is None else kv_map.decoded(x_BLHMD, kind))
    return _pad_slots(decoded, rows_by_slots, dim=3, fill=0)


def _byte_ends(samples: Sequence[EncodedSampleKV], rows_by_slots: dict[int, list[int]]) -> Tensor:
    ends_by_slots: list[Tensor] = []
    for rows in rows_by_slots.values():
        # One gather over the concatenated tokens of the samples.
        ends = torch.cat([samples[row].byte_ends_T for row in rows]).long()
        starts_B = torch.tensor([0, *(samples[row].byte_ends_T.numel() for row in rows[:-1])]).cumsum(0)
        positions_BLHM = torch.stack([samples[row].positions for row in rows]).long()
        ends_by_slots.append(ends[positions_BLHM + starts_B[:, None, None, None]])
    return _pad_slots(ends_by_slots, rows_by_slots, dim=3, fill=-1)


def _pad_slots(groups: list[Tensor], rows_by_slots: dict[int, list[int]], dim: int, fill: int) -> Tensor:
    """Restores the batch's order from groups of samples with equal M, padded along `dim` to the largest M."""
    if len(groups) == 1:
        return groups[0]
    shape = list(groups[0].shape)
    shape[0], shape[dim] = sum(map(len, rows_by_slots.values())), max(rows_by_slots)
    padded = groups[0].new_full(shape, fill)
    for (slots, rows), group in zip(rows_by_slots.items(), groups, strict=True):
        padded.narrow(dim, 0, slots)[torch.tensor(rows)] = group
    return padded
