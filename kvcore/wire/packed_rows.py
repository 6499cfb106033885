"""The rows of entropy-coded layers in a frame's body.

A row holds the positions as in other codecs, then the coded keys and the coded values. Their sizes are in the record.
In scope `sample`, only the first layer's rows have positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from kvcore.errors import ProtocolError
from kvcore.plan import KVPlan
from kvcore.tensors.entropy_coding import encode_codes
from kvcore.tensors.kv_map import KVMap
from kvcore.types import TENSORS, Tensor


@dataclass(frozen=True, slots=True)
class PackedRow:
    """One layer of one sample: its row, the sizes of coded keys and values, and the bytes of their codes."""

    row: bytes
    sizes: tuple[int, int]
    codes: bytes


def has_positions(plan: KVPlan, at: int) -> bool:
    """Whether rows of the plan's `at`-th layer hold positions."""
    return at == 0 or plan.selection.scope != "sample"


def pack_rows(
    plan: KVPlan, kv_map: KVMap, at: int, parts: Mapping[str, Tensor], positions_BHM: Tensor
) -> list[PackedRow]:
    """Codes the plan's `at`-th layer of several samples.

    Args:
        plan: of the request.
        kv_map: the plan's map.
        at: index of the layer in the plan.
        parts: `k.codes` and `v.codes`, int16 [B,H,M,D], on the CPU.
        positions_BHM: int32 [B,H|1,M].
    """
    positions = positions_BHM.to(torch.int32).contiguous().numpy()
    codes = {kind: _rows_of(parts[f"{kind}.codes"]) for kind in TENSORS}
    rows: list[PackedRow] = []
    for sample in range(len(positions)):
        plain = [codes[kind][sample] for kind in TENSORS]
        k, v = (encode_codes(each, kv_map.classes(at, kind)) for kind, each in zip(TENSORS, plain, strict=True))
        head = positions[sample].astype("<i4").tobytes() if has_positions(plan, at) else b""
        rows.append(PackedRow(head + k + v, (len(k), len(v)), b"".join(each.astype("<i2").tobytes() for each in plain)))
    return rows


def packed_sizes(record: Mapping[str, object], samples: int, most: int) -> list[tuple[int, int]]:
    """The sizes of coded keys and values that a layer record states for each of its samples.

    Raises:
        ProtocolError: they are missing, or larger than `most` bytes for a tensor.
    """
    sizes = record.get("packed")
    if not isinstance(sizes, list) or len(cast("list[Any]", sizes)) != samples:
        raise ProtocolError(f"'packed' does not hold the sizes of {samples} samples")
    found: list[tuple[int, int]] = []
    for pair in cast("list[Any]", sizes):
        if not isinstance(pair, list) or [type(size) for size in cast("list[Any]", pair)] != [int, int]:
            raise ProtocolError(f"'packed' must hold two sizes for each sample; got {pair!r}")
        k, v = cast("list[int]", pair)
        if not (0 < k <= most and 0 < v <= most):
            raise ProtocolError(f"'packed' must hold sizes of 1 to {most} bytes; got {k} and {v}")
        found.append((k, v))
    return found


def _rows_of(codes_BHMD: Tensor) -> NDArray[np.int16]:
    """[B,M,H*D]."""
    return codes_BHMD.transpose(1, 2).flatten(2).contiguous().numpy()
