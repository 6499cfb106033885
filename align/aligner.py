"""One teacher's K/V and the student's, brought into one space: layer map, head adapter, and the targets' scale."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from align.head_dim_adapter import (
    TENSORS,
    HeadDimAdapter,
    KVGeometry,
    RidgeStatistics,
    TeacherSpaceRegressor,
    TensorKind,
)
from align.layer_map import LayerMapper
from align.tokenizer_align import pair_ends_batch
from kvcore.errors import ConfigError, FieldError
from kvcore.types import BatchKV, Tensor

logger = logging.getLogger(__name__)

DIRECTIONS = ("to_student", "to_teacher")
HOLD_OUT_EVERY = 5


class Aligner(nn.Module):
    """Alignment with one teacher.

    `to_student`: targets are the teacher's K/V, layer-mapped and adapted to the student's heads; the student's are
    compared as they are. `to_teacher`: targets are the teacher's K/V, layer-mapped; the student's go through a trained
    regressor into the teacher's heads. Either way: `targets(kv)` against `student_view(x, tensor)`, both
    [B,L_s,H,M,D], divided by `scale(tensor)`.

    A `Calibration` (or `load_state_tensors`) must come before the first use.

    Args:
        teacher: the whole teacher's geometry.
        student: the student's.
        direction: `to_student` or `to_teacher`.
        layer_map: a strategy of `LayerMapper`.
        head_adapter: a kind of `HeadDimAdapter`. `to_teacher` trains its regressor from a ridge start under both
            `ridge` and `linear`.

    Raises:
        FieldError: a setting that is unknown or can't be combined.
    """

    scale_LK: Tensor
    variance_LK: Tensor
    rows_2: Tensor
    _map_SL: Tensor

    def __init__(
        self,
        teacher: KVGeometry,
        student: KVGeometry,
        *,
        direction: str = "to_student",
        layer_map: str = "ratio",
        head_adapter: str = "ridge",
    ) -> None:
        super().__init__()
        if direction not in DIRECTIONS:
            raise FieldError("align.direction", f"expected one of {', '.join(DIRECTIONS)}; got '{direction}'")
        if direction == "to_teacher" and head_adapter == "identity":
            raise FieldError(
                "align.head_adapter",
                "'identity' leaves 'to_teacher' nothing to train; use align.direction 'to_student'",
            )
        self.direction = direction
        self.head_adapter = head_adapter
        self.teacher = teacher
        self.student = student
        self.mapper = LayerMapper(teacher.layers, student.layers, layer_map)
        self.adapter: HeadDimAdapter = (
            HeadDimAdapter(student.layers, teacher, student, head_adapter)
            if direction == "to_student"
            else TeacherSpaceRegressor(student.layers, student, teacher)
        )
        # Columns: 0 keys, 1 values.
        self.register_buffer("scale_LK", torch.full((student.layers, 2), math.nan))
        self.register_buffer("variance_LK", torch.full((student.layers, 2), math.nan))
        self.register_buffer("rows_2", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("_map_SL", self.mapper.matrix()[:, list(self.layers_needed)], persistent=False)

    @property
    def layers_needed(self) -> tuple[int, ...]:
        """The teacher layers that a plan must ask for; `BatchKV` holds them in this order."""
        return self.mapper.layers_needed

    @property
    def needs_student(self) -> bool:
        """Whether calibration has to see the student's K/V: a map is fitted, not only the targets' scale measured."""
        return self.adapter.kind != "identity"

    def check_scope(self, scope: str) -> None:
        """Refuses a selection whose slots hold different tokens in places that this alignment mixes.

        Raises:
            FieldError: naming the scope that fits.
        """
        if self.mapper.mixes_layers and scope != "sample":
            raise FieldError(
                "kv.selection.scope",
                f"the layer map mixes layers, which need the same tokens: use 'sample', not '{scope}'",
            )
        if self.needs_student and scope != "sample":
            raise FieldError(
                "kv.selection.scope",
                "the head adapter mixes heads, and is fitted on the same tokens in all layers: use 'sample', not "
                f"'{scope}'",
            )

    def map_layers(self, x_BLHMD: Tensor) -> Tensor:
        """The teacher's `layers_needed` to one layer per student layer, in fp32."""
        assert x_BLHMD.shape[1] == len(self.layers_needed), "the batch holds other layers than the plan asks for"
        if not self.mapper.mixes_layers:
            return x_BLHMD[:, self._map_SL.argmax(dim=1)].float()
        return torch.einsum("sl,blhmd->bshmd", self._map_SL.float(), x_BLHMD.float())

    def targets(self, kv: BatchKV) -> tuple[Tensor, Tensor]:
        """k_BLHMD and v_BLHMD to match, in fp32; what stands in masked slots means nothing."""
        assert kv.k_BLHMD is not None, "the plan left keys out"
        assert kv.v_BLHMD is not None, "the plan left values out"
        k_BLHMD, v_BLHMD = self.map_layers(kv.k_BLHMD), self.map_layers(kv.v_BLHMD)
        if self.direction == "to_teacher":
            return k_BLHMD, v_BLHMD
        return self.adapter(k_BLHMD, "k"), self.adapter(v_BLHMD, "v")

    def student_view(self, x_BLHMD: Tensor, tensor: TensorKind) -> Tensor:
        """The student's keys or values in the space of the targets, in fp32, with gradient."""
        return x_BLHMD.float() if self.direction == "to_student" else self.adapter(x_BLHMD, tensor)

    def scale(self, tensor: TensorKind) -> Tensor:
        """[L_s]: standard deviation of all elements of a layer's targets: a loss divides both sides by it."""
        return self.scale_LK[:, TENSORS.index(tensor)].float()

    def variance(self, tensor: TensorKind) -> Tensor:
        """[L_s]: the targets' variance around each feature's mean: the squared error of predicting that mean."""
        return self.variance_LK[:, TENSORS.index(tensor)].float()

    def warn_if_poor(self, threshold: float = 0.2, name: str = "teacher") -> None:
        """Logs a warning that names the layers that the adapter explains badly."""
        self.adapter.warn_if_poor(threshold, name)

    def report(self) -> dict[str, Any]:
        """What a person wants to know of this alignment, ready for JSON."""
        return {
            "direction": self.direction,
            "head_adapter": self.head_adapter,
            "layer_map": {
                str(s): [[t, round(weight, 6)] for t, weight in row] for s, row in self.mapper.get_mapping().items()
            },
            "rows": {"fit": int(self.rows_2[0]), "held_out": int(self.rows_2[1])},
            "explained_variance": {
                tensor: [value if math.isfinite(value) else None for value in self.adapter.explained_variance(tensor)]
                for tensor in TENSORS
            },
            "alpha": {tensor: self.adapter.alpha(tensor) for tensor in TENSORS},
            "scale": {tensor: self.scale(tensor).tolist() for tensor in TENSORS},
            "variance": {tensor: self.variance(tensor).tolist() for tensor in TENSORS},
        }

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything measured, fitted or trained, on CPU, as safetensors takes it."""
        return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.state_dict().items()}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes over what `state_tensors` gave.

        Raises:
            ConfigError: they belong to an alignment of other models or settings.
        """
        try:
            self.load_state_dict(tensors, strict=True)
        except RuntimeError as error:
            raise ConfigError(f"the saved alignment belongs to other models or settings: {error}") from error


@dataclass(frozen=True, slots=True)
class StudentRead:
    """The student's own content K/V over the text that the teacher read, and where its tokens end (-1 in padding)."""

    k_BLHTD: Tensor
    v_BLHTD: Tensor
    byte_ends_BT: Tensor


class Calibration:
    """Streams statistics over calibration samples, then fits an aligner and measures its targets' scale.

    Rows are pairs of a teacher slot and a student token that end at the same byte. One sample in `HOLD_OUT_EVERY` is
    held out: the ridge penalty is chosen, and the explained variance measured, on those.

    Args:
        aligner: fitted in place by `finish`. The sums live on its device.
    """

    def __init__(self, aligner: Aligner) -> None:
        self._aligner = aligner
        teacher, student = aligner.teacher.features, aligner.student.features
        inputs, outputs = (teacher, student) if aligner.direction == "to_student" else (student, teacher)
        if not aligner.needs_student:
            outputs = 0
        device = aligner.scale_LK.device
        self._parts: list[dict[TensorKind, list[RidgeStatistics]]] = [
            {
                name: [RidgeStatistics(inputs, outputs, device) for _ in range(aligner.student.layers)]
                for name in TENSORS
            }
            for _ in ("fit", "held out")
        ]

    @torch.no_grad()
    def update(self, kv: BatchKV, sample_B: Tensor, student: StudentRead | None = None) -> None:
        """Adds a batch.

        Args:
            kv: the teacher's, with the aligner's `layers_needed`.
            sample_B: each sample's number among all calibration samples, over all ranks: it decides what is held out.
            student: needed unless the aligner only measures (`needs_student` is False).
        """
        student = student if self._aligner.needs_student else None
        sample_N, slot_N, token_N = self._rows(kv, student)
        held_out_N = sample_B.to(sample_N.device)[sample_N] % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1
        assert kv.k_BLHMD is not None, "the plan left keys out"
        assert kv.v_BLHMD is not None, "the plan left values out"
        teacher_side = {"k": kv.k_BLHMD, "v": kv.v_BLHMD}
        student_side = {} if student is None else {"k": student.k_BLHTD, "v": student.v_BLHTD}
        for tensor in TENSORS:
            x_NLF = _features(self._aligner.map_layers(teacher_side[tensor]), sample_N, slot_N)
            y_NLG = _features(student_side[tensor], sample_N, token_N) if student_side else x_NLF[..., :0]
            if self._aligner.direction == "to_teacher":
                x_NLF, y_NLG = y_NLG, x_NLF
            for part, rows_N in zip(self._parts, (~held_out_N, held_out_N), strict=True):
                x_part, y_part = x_NLF[rows_N].double(), y_NLG[rows_N].double()
                for layer, statistics in enumerate(part[tensor]):
                    statistics.update(x_part[:, layer], y_part[:, layer])

    def _rows(self, kv: BatchKV, student: StudentRead | None) -> tuple[Tensor, Tensor, Tensor]:
        """For each row: sample of the batch, teacher slot, student token."""
        if student is None:
            assert not self._aligner.needs_student, "fitting needs the student's own K/V"
            sample_N, slot_N = kv.mask_BM.nonzero(as_tuple=True)
            return sample_N, slot_N, slot_N
        index_BT = slots_of_tokens(kv, student.byte_ends_BT)
        sample_N, token_N = (index_BT >= 0).nonzero(as_tuple=True)
        return sample_N, index_BT[sample_N, token_N], token_N

    def tensors(self) -> list[Tensor]:
        """Every sum, to be added over ranks in place before `finish`."""
        return [
            tensor for part in self._parts for name in TENSORS for layer in part[name] for tensor in layer.tensors()
        ]

    def finish(self) -> None:
        """Fits the aligner's map and sets its scale.

        Raises:
            FieldError: too few rows, or targets that never vary.
        """
        fit, held_out = self._parts
        counts = [int(part["k"][0].count) for part in self._parts]
        if min(counts) < 2:
            raise FieldError(
                "align.calibration_samples",
                f"gave {counts[0]} token pairs to fit on and {counts[1]} held out, and at least 2 of each are needed; "
                "raise it, or check that teacher and student read the same texts",
            )
        self._aligner.rows_2.copy_(torch.tensor(counts))
        for column, tensor in enumerate(TENSORS):
            if self._aligner.needs_student:
                self._aligner.adapter.fit(tensor, fit[tensor], held_out[tensor])
            for layer, (seen, unseen) in enumerate(zip(fit[tensor], held_out[tensor], strict=True)):
                scale, variance = self._target_scale(tensor, layer, seen.merged(unseen))
                self._aligner.scale_LK[layer, column] = scale
                self._aligner.variance_LK[layer, column] = variance

    def _target_scale(self, tensor: TensorKind, layer: int, rows: RidgeStatistics) -> tuple[float, float]:
        """Standard deviation of all elements, and mean variance around each feature's mean, of one layer's targets."""
        mean, variance = self._target_moments(tensor, layer, rows)
        square = float((variance + mean.square()).mean())
        if float(variance.mean()) <= 1e-12 * square:
            raise FieldError(
                "align.calibration_samples", f"the targets of student layer {layer} ({tensor}) never vary; raise it"
            )
        return math.sqrt(square - float(mean.mean()) ** 2), float(variance.mean())

    def _target_moments(self, tensor: TensorKind, layer: int, rows: RidgeStatistics) -> tuple[Tensor, Tensor]:
        """Mean and variance of each feature of one layer's targets, from the statistics alone."""
        if self._aligner.direction == "to_teacher":
            return rows.mean_y, rows.scatter_yy() / rows.count
        covariance_FF = rows.scatter_xx() / rows.count
        affine = self._aligner.adapter.layer_map(tensor, layer)
        if affine is None:
            return rows.mean_x, covariance_FF.diagonal()
        weight_FG, bias_G = (part.double() for part in affine)
        return rows.mean_x @ weight_FG + bias_G, (weight_FG * (covariance_FF @ weight_FG)).sum(dim=0)


def _features(x_BLHMD: Tensor, sample_N: Tensor, place_N: Tensor) -> Tensor:
    """The heads of chosen tokens in a row: [N,L,F]."""
    return x_BLHMD[sample_N, :, :, place_N].flatten(2)


def slots_of_tokens(kv: BatchKV, student_ends_BT: Tensor) -> Tensor:
    """For each student token the teacher slot whose token ends at the same byte, or -1 (`boundary` pairing).

    Args:
        kv: of a plan with scope `sample`, or with one layer and head: its slots hold the same token everywhere.
        student_ends_BT: byte ends of the student's tokens in the same texts, -1 in padding.

    Returns:
        int64 [B,T], an index into M.
    """
    assert kv.byte_ends_BLHM.shape[1:3] == (1, 1), "slots hold different tokens in different layers or heads"
    ends_BM = kv.byte_ends_BLHM[:, 0, 0].masked_fill(~kv.mask_BM, -1)
    return pair_ends_batch(ends_BM, student_ends_BT.to(ends_BM.device))


def gather_slots(x_BLHMD: Tensor, index_BT: Tensor) -> Tensor:
    """Slots at each student token: x_BLHTD, zeros where the index is -1 (to be masked by `index_BT >= 0`)."""
    batch, layers, heads, _, dim = x_BLHMD.shape
    index = index_BT.clamp(min=0)[:, None, None, :, None].expand(batch, layers, heads, index_BT.shape[1], dim)
    return x_BLHMD.gather(3, index).masked_fill(index_BT[:, None, None, :, None] < 0, 0.0)
