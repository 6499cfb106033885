"""Which teacher layers each student layer is compared with, and with what weights."""

from __future__ import annotations

import torch

from kvcore.errors import FieldError
from kvcore.types import Tensor

STRATEGIES = ("ratio",)


class LayerMapper:
    """A row-stochastic map from teacher layers to student layers.

    `ratio`: student layer s stands at teacher depth s (L_t - 1) / (L_s - 1), so that first meets first and last meets
    last exactly; between two teacher layers it takes both, weighted linearly. A student of one layer takes the
    teacher's last. A teacher with fewer layers than the student is shared among neighbouring student layers.

    Args:
        teacher_layers: L_t.
        student_layers: L_s.
        strategy: `ratio`.

    Raises:
        FieldError: a number of layers below 1, or an unknown strategy.
    """

    def __init__(self, teacher_layers: int, student_layers: int, strategy: str = "ratio") -> None:
        for field, layers in (("teacher_layers", teacher_layers), ("student_layers", student_layers)):
            if layers < 1:
                raise FieldError(field, f"a model has at least 1 layer; got {layers}")
        if strategy not in STRATEGIES:
            raise FieldError("strategy", f"expected one of {', '.join(STRATEGIES)}; got '{strategy}'")
        self.teacher_layers = teacher_layers
        self.student_layers = student_layers
        self.strategy = strategy
        self._mapping = {s: _ratio_row(s, teacher_layers, student_layers) for s in range(student_layers)}

    def get_mapping(self) -> dict[int, list[tuple[int, float]]]:
        """For each student layer the teacher layers it draws on, ascending, with weights above 0 that sum to 1."""
        return {s: list(row) for s, row in self._mapping.items()}

    def matrix(self) -> Tensor:
        """The same as a row-stochastic fp32 tensor [L_s,L_t]."""
        matrix = torch.zeros(self.student_layers, self.teacher_layers)
        for s, row in self._mapping.items():
            for t, weight in row:
                matrix[s, t] = weight
        return matrix

    @property
    def layers_needed(self) -> tuple[int, ...]:
        """The teacher layers with a weight above 0, ascending: what the plan asks for."""
        return tuple(sorted({t for row in self._mapping.values() for t, _ in row}))

    @property
    def mixes_layers(self) -> bool:
        """Whether a student layer draws on several teacher layers, which then need the same tokens in their slots."""
        return any(len(row) > 1 for row in self._mapping.values())


def _ratio_row(s: int, teacher_layers: int, student_layers: int) -> list[tuple[int, float]]:
    if student_layers == 1:
        return [(teacher_layers - 1, 1.0)]
    # Whole numbers, so that no rounding moves a layer that falls exactly on a teacher layer.
    below, remainder = divmod(s * (teacher_layers - 1), student_layers - 1)
    if remainder == 0:
        return [(below, 1.0)]
    share = remainder / (student_layers - 1)
    return [(below, 1.0 - share), (below + 1, share)]
