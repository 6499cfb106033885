"""Brings one teacher's K/V and the student's into the same space: layers, heads, and the targets' scale."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from align.head_dim_adapter import HeadDimAdapter, KVGeometry, TeacherSpaceRegressor
from align.layer_map import LayerMapper, LearnedLayerMap
from align.tokenizer_align import METHODS
from kvcore.errors import ConfigError, FieldError
from kvcore.files import finite_or_null
from kvcore.types import TENSORS, BatchKV, Tensor, TensorKind

DIRECTIONS = ("to_student", "to_teacher")
# Adapters that `to_teacher` trains, starting from ridge; the others are frozen in both directions.
_REGRESSORS = ("ridge", "linear")


class Aligner(nn.Module):
    """Alignment with one teacher.

    `to_student`: targets are the teacher's K/V after the layer map and the adapter to the student's heads; the
    student's K/V are compared unchanged. `to_teacher`: targets are the teacher's K/V after the layer map; the student's
    K/V are mapped to the teacher's heads. In both, a loss compares `targets(kv)` with `student_view(x, tensor)`, both
    [B,L_s,H,M,D], divided by `scale(tensor)`.

    A `Calibration` (or `load_state_tensors`) must come before the first use; with the layer map `cka` a
    `LayerCalibration` before that.

    Args:
        teacher: geometry of the whole teacher.
        student: geometry of the student.
        direction: `to_student` or `to_teacher`.
        layer_map: a strategy of `LayerMapper`. `learned` trains, with gradients through `targets`.
        head_adapter: a kind of `HeadDimAdapter`. `linear` trains, with gradients through `targets` (`to_student`) or
            `student_view` (`to_teacher`, where `ridge` does the same). `mapped`: the teacher sends K/V that have the
            student's heads already; `teacher` is then its layers with these heads.
        tokens: how calibration pairs tokens of two tokenizers, `boundary` or `overlap`.
        sink_tokens: how many first tokens of a text calibration leaves out, since they are attention sinks.
        ridge_rank: the highest rank of the maps of `ridge`, only for `to_student`; by default it is not limited.

    Raises:
        FieldError: an unknown setting, or two that cannot be combined.
    """

    scale_LK: Tensor
    variance_LK: Tensor
    mean_KLHD: Tensor
    shuffled_LK: Tensor
    cka_KST: Tensor
    rows_2: Tensor
    coverage_4: Tensor
    _map_SL: Tensor

    def __init__(
        self,
        teacher: KVGeometry,
        student: KVGeometry,
        *,
        direction: str = "to_student",
        layer_map: str = "uniform",
        head_adapter: str = "ridge",
        tokens: str = "boundary",
        sink_tokens: int = 1,
        ridge_rank: int | None = None,
    ) -> None:
        super().__init__()
        _check_settings(direction, layer_map, head_adapter, tokens, sink_tokens)
        _check_ridge_use(ridge_rank, direction, head_adapter)
        self.direction, self.head_adapter, self.tokens = direction, head_adapter, tokens
        self.sink_tokens, self.ridge_rank = sink_tokens, ridge_rank
        self.teacher, self.student = teacher, student
        self.mapper = LayerMapper(teacher.layers, student.layers, layer_map)
        # Fitting `cka` reduces the mapper's layers, but the plan still asks for these.
        self._layers_needed = self.mapper.layers_needed
        self.learned_map = LearnedLayerMap(self.mapper) if layer_map == "learned" else None
        self.adapter = self._make_adapter()
        self._register_measurements()

    def _make_adapter(self) -> HeadDimAdapter:
        teacher, student = self.teacher, self.student
        if self.direction == "to_student":
            return HeadDimAdapter(student.layers, teacher, student, self.head_adapter, self.ridge_rank)
        if self.head_adapter in _REGRESSORS:
            return TeacherSpaceRegressor(student.layers, student, teacher)
        return HeadDimAdapter(student.layers, student, teacher, self.head_adapter)

    def _register_measurements(self) -> None:
        """Buffers that calibration fills; NaN or 0 until then. Dimension K: 0 keys, 1 values."""
        layers = self.student.layers
        target = self.student if self.direction == "to_student" else self.teacher
        shapes = {
            "scale_LK": (layers, 2),
            "variance_LK": (layers, 2),
            "mean_KLHD": (2, layers, target.heads, target.head_dim),
            "shuffled_LK": (layers, 2),
        }
        for name, shape in shapes.items():
            self.register_buffer(name, torch.full(shape, math.nan))
        cka_KST = torch.full((2, layers, self.teacher.layers), math.nan, dtype=torch.float64)
        self.register_buffer("cka_KST", cka_KST)
        self.register_buffer("rows_2", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("coverage_4", torch.zeros(4, dtype=torch.int64))
        map_SL = torch.full((layers, len(self.layers_needed)), math.nan)
        self.register_buffer("_map_SL", map_SL, persistent=False)
        if self.mapper.fitted:
            self._take_layer_map()

    def _take_layer_map(self) -> None:
        self._map_SL.copy_(self.mapper.matrix()[:, list(self.layers_needed)])

    @property
    def layers_needed(self) -> tuple[int, ...]:
        """The teacher layers that a plan must ask for, in the order of `BatchKV`."""
        return self._layers_needed

    @property
    def needs_layer_pass(self) -> bool:
        """Whether a `LayerCalibration` is needed before the `Calibration`."""
        return not self.mapper.fitted

    @property
    def fits_adapter(self) -> bool:
        """Whether calibration fits or measures a map between heads, in addition to the targets' scale."""
        return self.adapter.kind != "identity"

    @property
    def needs_student(self) -> bool:
        """Whether calibration needs the student's K/V."""
        return self.fits_adapter or self.mapper.strategy == "cka"

    def map_layers(self, x_BLHMD: Tensor) -> Tensor:
        """Maps the teacher's `layers_needed` to one layer per student layer, in fp32."""
        assert x_BLHMD.shape[1] == len(self.layers_needed), "the batch has other layers than the plan asks for"
        assert not self.needs_layer_pass, "a LayerCalibration must find the layer map first"
        if self.learned_map is not None:
            return self.learned_map(x_BLHMD)
        if not self.mapper.mixes_layers:
            return x_BLHMD[:, self._map_SL.argmax(dim=1)].float()
        return torch.einsum("sl,blhmd->bshmd", self._map_SL.float(), x_BLHMD.float())

    def targets(self, kv: BatchKV) -> tuple[Tensor, Tensor]:
        """Target k_BLHMD and v_BLHMD in fp32; masked slots hold arbitrary values.

        Gradients flow into modules that train on the teacher's side: `learned`, and `linear` with `to_student`.
        """
        if any(parameter.requires_grad for parameter in self.parameters()):
            # An empty slot may hold NaN, and NaN times a gradient of 0 is NaN.
            empty = ~kv.mask_BM[:, None, None, :, None]
            kv = kv.map(lambda x_BLHMD: x_BLHMD.masked_fill(empty, 0.0))
        kv = kv.map(self.map_layers)
        if self.direction == "to_teacher":
            return kv.k_BLHMD, kv.v_BLHMD
        return self.adapter(kv.k_BLHMD, "k"), self.adapter(kv.v_BLHMD, "v")

    def student_view(self, x_BLHMD: Tensor, tensor: TensorKind) -> Tensor:
        """The student's keys or values in the space of the targets, in fp32, with gradient."""
        return x_BLHMD.float() if self.direction == "to_student" else self.adapter(x_BLHMD, tensor)

    def scale(self, tensor: TensorKind) -> Tensor:
        """[L_s]: standard deviation of all elements of a layer's targets; a loss divides both sides by it."""
        return self.scale_LK[:, TENSORS.index(tensor)].float()

    def variance(self, tensor: TensorKind) -> Tensor:
        """[L_s]: variance of the targets around each feature's mean, the squared error of predicting the mean."""
        return self.variance_LK[:, TENSORS.index(tensor)].float()

    def mean(self, tensor: TensorKind) -> Tensor:
        """[L_s,H,D]: mean of each feature of the targets, in their geometry."""
        return self.mean_KLHD[TENSORS.index(tensor)].float()

    def fit_layers(self, cka_KST: Tensor) -> None:
        """Fits the layer map `cka` to the similarities of keys and values [2,L_s,L_t], averaged.

        Raises:
            FieldError: a similarity is not finite, or the layer map is not `cka`.
        """
        self.mapper.fit_cka(cka_KST.mean(dim=0))
        self.cka_KST.copy_(cka_KST)
        self._take_layer_map()

    def warn_if_poor(self, name: str) -> None:
        """Logs a warning with the layers that the teacher explains poorly, and what helps."""
        advice = "train the student on cross-entropy first, or for longer (align.warmup_steps)"
        if self.direction == "to_student":
            advice += ", or train the map instead (align.direction to_teacher)"
        self.adapter.warn_if_poor(name, advice)

    def report(self) -> dict[str, Any]:
        """A description of this alignment for reports, as JSON values; None where nothing was measured."""
        return _describe(self)

    def state_tensors(self) -> dict[str, Tensor]:
        """Copies of everything measured, fitted or trained, on the CPU, for safetensors."""
        return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.state_dict().items()}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Loads the result of `state_tensors`.

        Raises:
            ConfigError: it belongs to an alignment of other models or settings.
        """
        try:
            self.load_state_dict(tensors, strict=True)
        except RuntimeError as error:
            raise ConfigError(f"the saved alignment belongs to other models or settings: {error}") from error
        if self.mapper.strategy == "cka":
            self.fit_layers(self.cka_KST.clone())


def _check_ridge_use(rank: int | None, direction: str, head_adapter: str) -> None:
    """Checks that a limited rank is one of frozen ridge maps.

    Raises:
        FieldError: names the other setting.
    """
    if rank is None:
        return
    for field, wanted, got in (("direction", "to_student", direction), ("head_adapter", "ridge", head_adapter)):
        if got != wanted:
            raise FieldError("align.ridge_rank", f"needs align.{field} '{wanted}'; got '{got}'")


def _check_settings(direction: str, layer_map: str, head_adapter: str, tokens: str, sink_tokens: int) -> None:
    if direction not in DIRECTIONS:
        raise FieldError("align.direction", f"expected one of {', '.join(DIRECTIONS)}; got '{direction}'")
    if direction == "to_teacher" and head_adapter in ("identity", "mapped"):
        raise FieldError(
            "align.head_adapter",
            f"'to_teacher' trains the map, and '{head_adapter}' has none; use align.direction 'to_student'",
        )
    if direction == "to_teacher" and layer_map == "learned":
        raise FieldError(
            "align.layer_map", "'learned' would change the targets of 'to_teacher' during training; use 'to_student'"
        )
    if tokens not in METHODS:
        raise FieldError("align.tokens", f"expected one of {', '.join(METHODS)}; got '{tokens}'")
    if sink_tokens < 0:
        raise FieldError("align.sink_tokens", f"expected at least 0; got {sink_tokens}")


def _describe(aligner: Aligner) -> dict[str, Any]:
    """See `Aligner.report`."""
    fit, held_out = aligner.rows_2.tolist()
    shuffled_LK = aligner.shuffled_LK if aligner.fits_adapter else aligner.shuffled_LK[:0]
    return {
        "direction": aligner.direction,
        "head_adapter": aligner.head_adapter,
        "ridge_rank": aligner.ridge_rank,
        "layer_strategy": aligner.mapper.strategy,
        "tokens": aligner.tokens,
        "sink_tokens": aligner.sink_tokens,
        "teacher": _geometry(aligner.teacher),
        "student": _geometry(aligner.student),
        "layer_map": _mapping(aligner),
        "cka": _by_tensor(aligner.cka_KST) if aligner.mapper.strategy == "cka" else None,
        "rows": {"fit": fit, "held_out": held_out},
        "coverage": _coverage(aligner.coverage_4),
        "explained_variance": {
            tensor: finite_or_null(aligner.adapter.explained_variance(tensor)) for tensor in TENSORS
        },
        "explained_variance_shuffled": _by_tensor(shuffled_LK.T),
        "alpha": {tensor: finite_or_null(aligner.adapter.alpha(tensor)) for tensor in TENSORS},
        "scale": {tensor: finite_or_null(aligner.scale(tensor).tolist()) for tensor in TENSORS},
        "variance": {tensor: finite_or_null(aligner.variance(tensor).tolist()) for tensor in TENSORS},
    }


def _geometry(geometry: KVGeometry) -> dict[str, int]:
    return {"layers": geometry.layers, "heads": geometry.heads, "head_dim": geometry.head_dim}


def _mapping(aligner: Aligner) -> dict[str, list[list[float]]] | None:
    if aligner.needs_layer_pass:
        return None
    if aligner.learned_map is None:
        rows = aligner.mapper.get_mapping()
    else:
        rows = {s: list(enumerate(row)) for s, row in enumerate(aligner.learned_map.weights().tolist())}
    return {str(s): [[t, round(weight, 6)] for t, weight in row if round(weight, 6) > 0] for s, row in rows.items()}


def _coverage(counts_4: Tensor) -> dict[str, dict[str, int]] | None:
    tokens, tokens_paired, slots, slots_paired = counts_4.tolist()
    if tokens == 0:
        return None
    return {
        "student_tokens": {"seen": tokens, "paired": tokens_paired},
        "teacher_slots": {"seen": slots, "paired": slots_paired},
    }


def _by_tensor(x_K: Tensor) -> dict[str, Any]:
    return {tensor: finite_or_null(x.tolist()) for tensor, x in zip(TENSORS, x_K, strict=True)}
