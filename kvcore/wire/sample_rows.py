"""The layout of a layer record in a frame's body, and the arrays that collect layers into whole samples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kvcore.errors import ProtocolError
from kvcore.plan import KVPlan
from kvcore.tensors.codec import part_layout
from kvcore.types import TENSORS, TeacherInfo, Tensor
from kvcore.wire.frames import dtype_name


class RowLayout:
    """The layout of one sample's layer in a body: int32 positions [H|1,M], then the parts in order of their names."""

    def __init__(self, plan: KVPlan, info: TeacherInfo, slots: int) -> None:
        self.slots = slots
        heads, head_dim = plan.sent_shape(info.kv_heads, info.head_dim)
        self.position_heads = info.kv_heads if plan.selection.scope == "head" else 1
        self.position_bytes = 4 * self.position_heads * slots
        layouts = [
            (f"{kind}.{name}", dtype, shape)
            for kind in TENSORS
            for name, dtype, shape in part_layout(plan.codec, kind, heads, slots, head_dim)
        ]
        self.parts = sorted(layouts, key=lambda part: part[0])
        described = [("positions", torch.int32, (self.position_heads, slots)), *self.parts]
        self.described = [[name, dtype_name(dtype), list(shape)] for name, dtype, shape in described]
        self.sizes = [math.prod(shape) * dtype.itemsize for _, dtype, shape in self.parts]
        self.row_bytes = self.position_bytes + sum(self.sizes)

    def positions(self, rows: NDArray[np.uint8]) -> NDArray[np.int32]:
        """The positions [B,H|1,M] at the start of each row."""
        head = np.ascontiguousarray(rows[:, : self.position_bytes])
        return head.view("<i4").reshape(len(rows), self.position_heads, self.slots)


class Group:
    """Samples that were sent together, with one array per part for all of them, so that a record is one copy.

    Args:
        layout: of their rows.
        count: number of samples.
        layers: number of the plan's layers.
        shared_positions: whether all layers have the same positions.
        packed: whether the parts are kept elsewhere, because they are entropy-coded.
    """

    def __init__(self, layout: RowLayout, count: int, layers: int, *, shared_positions: bool, packed: bool) -> None:
        self.layout = layout
        self._parts = [] if packed else layout.parts
        self._arrays = [] if packed else [np.empty((count, layers, size), np.uint8) for size in layout.sizes]
        self._shared_positions = shared_positions
        position_layers = 1 if shared_positions else layers
        self._positions_BLHM = np.empty((count, position_layers, layout.position_heads, layout.slots), np.int32)
        self._views: list[tuple[Tensor, ...]] = []

    def put(
        self, where: slice | list[int], at: int, rows: NDArray[np.uint8] | None, positions_BHM: NDArray[np.int32]
    ) -> None:
        """Copies the `at`-th layer of some of the samples into the arrays; only its positions without rows."""
        if not (self._shared_positions and at):
            self._positions_BLHM[where, at] = positions_BHM
        elif (self._positions_BLHM[where, 0] != positions_BHM).any():
            raise ProtocolError("positions differ between the layers of a sample, but the plan's scope is 'sample'")
        if rows is None:
            return
        start = self.layout.position_bytes
        for array, size in zip(self._arrays, self.layout.sizes, strict=True):
            array[where, at] = rows[:, start : start + size]
            start += size

    def take(self, row: int) -> tuple[dict[str, Tensor], Tensor]:
        """One sample's parts, each [L, ...], and its positions [L|1,H|1,M]."""
        if not self._views:
            self._views = [
                _unstack(array, dtype, shape)
                for array, (_, dtype, shape) in zip(self._arrays, self._parts, strict=True)
            ]
            self._views.append(torch.unbind(torch.as_tensor(self._positions_BLHM)))
        names = [name for name, _, _ in self._parts]
        return {name: views[row] for name, views in zip(names, self._views, strict=False)}, self._views[-1][row]


def _unstack(array_BLX: NDArray[np.uint8], dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Bytes of all samples as one tensor [L, ...] per sample, without a copy."""
    typed: Tensor = torch.as_tensor(array_BLX).view(dtype)
    return torch.unbind(typed.view(*array_BLX.shape[:2], *shape))


def store_rows(
    places: Sequence[tuple[Group, int]], at: int, rows: NDArray[np.uint8] | None, positions_BHM: NDArray[np.int32]
) -> None:
    """Copies the rows of the `at`-th layer, or only its positions, to each sample's group and row.

    All samples belong to one group, unless the teacher groups them differently in different layers.
    """
    members: dict[int, list[int]] = {}
    for index, (group, _) in enumerate(places):
        members.setdefault(id(group), []).append(index)
    for indices in members.values():
        where = _as_slice([places[index][1] for index in indices])
        picked = _as_slice(indices)
        places[indices[0]][0].put(where, at, None if rows is None else rows[picked], positions_BHM[picked])


def _as_slice(indices: list[int]) -> slice | list[int]:
    """Consecutive indices as a slice, which numpy copies without gathering."""
    end = indices[0] + len(indices)
    return slice(indices[0], end) if indices == list(range(indices[0], end)) else indices
