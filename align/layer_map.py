"""Maps teacher layers to student layers, with weights."""

from __future__ import annotations

import torch
from torch import nn

from align.layer_similarity import monotone_path
from kvcore.errors import FieldError
from kvcore.types import Tensor

STRATEGIES = ("ratio", "uniform", "last", "skip", "cka", "learned")

Row = list[tuple[int, float]]


class LayerMapper:
    """A row-stochastic map from teacher layers to student layers.

    | strategy | teacher layers of student layer s | layers mixed | first to first | last to last |
    |---|---|---|---|---|
    | `ratio` | depth p = s (L_t - 1) / (L_s - 1), interpolated linearly between two layers | yes | yes | yes |
    | `uniform` | the layer nearest to p; of two equally near the earlier | no | yes | yes |
    | `last` | layer L_t - L_s + s (the last L_s layers) | no | only if L_t = L_s | yes |
    | `skip` | layer s k, k = floor((L_t - 1) / (L_s - 1)); the last student layer the last | no | yes | yes |
    | `cka` | the best path through measured similarities, see `fit_cka` | no | yes | yes |
    | `learned` | as `ratio` at the start; trained by `LearnedLayerMap` | yes | at the start | at the start |

    A student with one layer takes the teacher's last layer. If the teacher has fewer layers than the student,
    neighbouring student layers share a teacher layer, and `last` and `skip` work like `ratio`.

    Sources: `last` and `skip` from PKD (arXiv 1908.09355); linear CKA from arXiv 1905.00414.

    Args:
        teacher_layers: L_t.
        student_layers: L_s.
        strategy: one of `STRATEGIES`.

    Raises:
        FieldError: fewer than 1 layer, or an unknown strategy.
    """

    def __init__(self, teacher_layers: int, student_layers: int, strategy: str = "uniform") -> None:
        for field, layers in (("teacher_layers", teacher_layers), ("student_layers", student_layers)):
            if layers < 1:
                raise FieldError(field, f"must be at least 1; got {layers}")
        if strategy not in STRATEGIES:
            raise FieldError("strategy", f"expected one of {', '.join(STRATEGIES)}; got '{strategy}'")
        self.teacher_layers = teacher_layers
        self.student_layers = student_layers
        self.strategy = strategy
        self._rows = None if strategy == "cka" else _fixed_rows(strategy, teacher_layers, student_layers)

    def fit_cka(self, cka_ST: Tensor) -> None:
        """Assigns one teacher layer to each student layer, such that the sum of similarities is maximal.

        Teacher layers never decrease; the first student layer takes the first, the last the last. Afterwards
        `layers_needed` has only the assigned layers.

        Args:
            cka_ST: similarities [L_s,L_t], as `CKAStatistics` measures them.

        Raises:
            FieldError: the strategy is not `cka`, or the similarities have a wrong shape or are not finite.
        """
        if self.strategy != "cka":
            raise FieldError("align.layer_map", f"only 'cka' can be fitted to similarities; got '{self.strategy}'")
        if cka_ST.shape != (self.student_layers, self.teacher_layers):
            raise FieldError(
                "align.layer_map",
                f"expected similarities of {self.student_layers} student layers with {self.teacher_layers} teacher "
                f"layers; got {list(cka_ST.shape)}",
            )
        if not bool(cka_ST.isfinite().all()):
            student, teacher = (~cka_ST.isfinite()).nonzero()[0].tolist()
            raise FieldError(
                "align.layer_map",
                f"'cka' cannot compare student layer {student} with teacher layer {teacher}: one of them never varies "
                "or is not finite in the calibration samples; raise align.calibration_samples or choose 'uniform'",
            )
        self._rows = [[(t, 1.0)] for t in monotone_path(cka_ST.double().tolist())]

    @property
    def fitted(self) -> bool:
        """Whether the map is known; only `cka` must be fitted."""
        return self._rows is not None

    def get_mapping(self) -> dict[int, Row]:
        """Teacher layers of each student layer, ascending, with positive weights that sum to 1.

        Raises:
            FieldError: `cka` before `fit_cka`.
        """
        return {s: list(row) for s, row in enumerate(self._known_rows())}

    def matrix(self) -> Tensor:
        """The map as a row-stochastic fp32 tensor [L_s,L_t].

        Raises:
            FieldError: `cka` before `fit_cka`.
        """
        matrix = torch.zeros(self.student_layers, self.teacher_layers)
        for s, row in enumerate(self._known_rows()):
            for t, weight in row:
                matrix[s, t] = weight
        return matrix

    def _known_rows(self) -> list[Row]:
        if self._rows is None:
            raise FieldError("align.layer_map", "'cka' must be fitted to measured similarities first")
        return self._rows

    @property
    def layers_needed(self) -> tuple[int, ...]:
        """The teacher layers that can have a weight above 0, ascending; the plan asks for these.

        All layers for `learned`, and for `cka` until it is fitted.
        """
        if self._rows is None or self.strategy == "learned":
            return tuple(range(self.teacher_layers))
        return tuple(sorted({t for row in self._rows for t, _ in row}))

    @property
    def mixes_layers(self) -> bool:
        """Whether a student layer mixes teacher layers, whose slots must then hold the same tokens."""
        if self.strategy == "learned":
            return self.teacher_layers > 1
        return self._rows is not None and any(len(row) > 1 for row in self._rows)


class LearnedLayerMap(nn.Module):
    """A trainable layer map: each student layer mixes all teacher layers with weights that sum to 1.

    Args:
        mapper: gives the initial weights (`ratio` for the strategy `learned`).
        floor: share of the initial weight that is spread evenly over all teacher layers, in (0,1]. A softmax cannot
            start at a weight of exactly 0, and learns slowly near it.

    Raises:
        FieldError: `floor` outside (0,1].
    """

    logits_SL: nn.Parameter

    def __init__(self, mapper: LayerMapper, floor: float = 0.01) -> None:
        super().__init__()
        if not 0.0 < floor <= 1.0:
            raise FieldError("floor", f"expected a share above 0 and at most 1; got {floor}")
        start_SL = (1.0 - floor) * mapper.matrix() + floor / mapper.teacher_layers
        self.logits_SL = nn.Parameter(start_SL.log())

    def forward(self, x_BLHMD: Tensor) -> Tensor:
        """Maps all teacher layers [B,L_t,H,M,D] to student layers [B,L_s,H,M,D], in fp32."""
        assert x_BLHMD.shape[1] == self.logits_SL.shape[1], "a learned layer map needs every teacher layer"
        return torch.einsum("sl,blhmd->bshmd", self.logits_SL.float().softmax(dim=1), x_BLHMD.float())

    def weights(self) -> Tensor:
        """Current weights, fp32 [L_s,L_t], rows sum to 1, without gradient."""
        return self.logits_SL.detach().float().softmax(dim=1)


def _fixed_rows(strategy: str, teacher_layers: int, student_layers: int) -> list[Row]:
    if student_layers == 1:
        return [[(teacher_layers - 1, 1.0)]]
    if strategy in {"ratio", "learned"} or (strategy in {"last", "skip"} and teacher_layers < student_layers):
        return [_ratio_row(s, teacher_layers, student_layers) for s in range(student_layers)]
    choose = {"uniform": _nearest, "last": _last, "skip": _skip}[strategy]
    return [[(choose(s, teacher_layers, student_layers), 1.0)] for s in range(student_layers)]


def _ratio_row(s: int, teacher_layers: int, student_layers: int) -> Row:
    # Integers, so that rounding cannot move a depth that is exactly a teacher layer.
    below, remainder = divmod(s * (teacher_layers - 1), student_layers - 1)
    if remainder == 0:
        return [(below, 1.0)]
    share = remainder / (student_layers - 1)
    return [(below, 1.0 - share), (below + 1, share)]


def _nearest(s: int, teacher_layers: int, student_layers: int) -> int:
    below, remainder = divmod(s * (teacher_layers - 1), student_layers - 1)
    return below + (2 * remainder > student_layers - 1)


def _last(s: int, teacher_layers: int, student_layers: int) -> int:
    return teacher_layers - student_layers + s


def _skip(s: int, teacher_layers: int, student_layers: int) -> int:
    stride = (teacher_layers - 1) // (student_layers - 1)
    return teacher_layers - 1 if s == student_layers - 1 else s * stride
