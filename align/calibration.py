"""Calibration of an alignment: finds the layer map, fits the adapter and measures the targets, from streamed rows.

A row is a pair of the teacher's and the student's features of one token of one text.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch

from align.aligner import Aligner
from align.head_dim_adapter import HeadDimAdapter
from align.layer_similarity import CKAStatistics
from align.linear_maps import RidgeStatistics
from align.token_layout import (
    at_student_tokens,
    at_teacher_slots,
    beyond_first,
    sink_ends,
    slots_beyond_sinks,
    slots_of_tokens,
)
from kvcore.errors import FieldError, KVDistillError
from kvcore.types import TENSORS, BatchKV, Tensor, TensorKind

HOLD_OUT_EVERY = 5
_FEWEST_ROWS = 2

Statistics = dict[TensorKind, list[RidgeStatistics]]


@dataclass(frozen=True, slots=True)
class StudentRead:
    """The student's own content K/V of the text that the teacher read, and its byte ends (-1 in padding)."""

    k_BLHTD: Tensor
    v_BLHTD: Tensor
    byte_ends_BT: Tensor


@dataclass(frozen=True, slots=True)
class _Rows:
    """Features [N,L,F] of both models at the same tokens, sample by sample; `own` is empty if nothing is fitted.

    `sample_N`: each row's sample in the batch, ascending.
    """

    sample_N: Tensor
    theirs: dict[TensorKind, Tensor]
    own: dict[TensorKind, Tensor]


class LayerCalibration:
    """Measures the similarity of every teacher layer to every student layer, for the layer map `cka`.

    Args:
        aligner: `finish` sets its layer map. The sums are on its device.
    """

    def __init__(self, aligner: Aligner) -> None:
        self._aligner = aligner
        teacher, student = aligner.teacher, aligner.student
        self._sums: dict[TensorKind, CKAStatistics] = {
            tensor: CKAStatistics(
                teacher.layers, student.layers, teacher.features, student.features, aligner.scale_LK.device
            )
            for tensor in TENSORS
        }

    @torch.no_grad()
    def update(self, kv: BatchKV, sample_B: Tensor, student: StudentRead) -> None:
        """Adds a batch; arguments as in `Calibration.update`. Held-out samples are included."""
        del sample_B
        rows = _paired_rows(self._aligner, kv, student)
        for tensor, sums in self._sums.items():
            sums.update(rows.theirs[tensor], rows.own[tensor])

    def tensors(self) -> list[Tensor]:
        """All sums; with several ranks, add them in place (all-reduce) before `finish`."""
        return [tensor for sums in self._sums.values() for tensor in sums.tensors()]

    def finish(self) -> None:
        """Sets the aligner's layer map.

        Raises:
            FieldError: too few rows, or a layer that never varies.
            KVDistillError: keys or values are not finite.
        """
        _check_finite(self.tensors())
        count = int(self._sums["k"].count)
        if count < _FEWEST_ROWS:
            raise FieldError("align.calibration_samples", _too_few(f"{count} token pairs to compare layers on"))
        self._aligner.fit_layers(torch.stack([self._sums[tensor].cka_ST() for tensor in TENSORS]))


class Calibration:
    """Accumulates statistics of calibration samples, then fits an aligner and measures its targets.

    One of `HOLD_OUT_EVERY` samples is held out; penalties are chosen and the explained variance is measured on these.
    A control is fitted and measured in the same way, with each teacher row paired with the student's row at the same
    place in another sample of the batch: it shows what is explained without the right pairing. The control is NaN if no
    batch has two samples.

    Memory, for a fitted adapter of F to G features over L layers: 64 L (F^2 + F G) bytes.

    Args:
        aligner: `finish` fits it in place. The sums are on its device.
    """

    def __init__(self, aligner: Aligner) -> None:
        assert not aligner.needs_layer_pass, "run a LayerCalibration first"
        self._aligner = aligner
        self._true = (self._no_sums(), self._no_sums())
        self._control = (self._no_sums(), self._no_sums()) if aligner.fits_adapter else None
        self._coverage_4 = torch.zeros_like(aligner.coverage_4)

    def _no_sums(self) -> Statistics:
        teacher, student = self._aligner.teacher.features, self._aligner.student.features
        inputs, outputs = (teacher, student) if self._aligner.direction == "to_student" else (student, teacher)
        if not self._aligner.fits_adapter:
            outputs = 0
        device = self._aligner.scale_LK.device
        return {
            name: [RidgeStatistics(inputs, outputs, device) for _ in range(self._aligner.student.layers)]
            for name in TENSORS
        }

    @torch.no_grad()
    def update(self, kv: BatchKV, sample_B: Tensor, student: StudentRead | None = None) -> None:
        """Adds a batch.

        Args:
            kv: the teacher's K/V in the aligner's `layers_needed`.
            sample_B: each sample's number among the calibration samples of all ranks; it decides which are held out.
            student: required if `needs_student`. Otherwise it only determines the sink tokens; without it none are left
                out.
        """
        rows = self._rows(kv, student)
        held_out_N = sample_B.to(rows.sample_N.device)[rows.sample_N] % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1
        other_N = row_of_another_sample(rows.sample_N)
        paired_N = other_N >= 0
        for tensor in TENSORS:
            theirs_NLF = rows.theirs[tensor]
            own_NLG = rows.own[tensor] if rows.own else theirs_NLF[..., :0]
            self._add(self._true, tensor, theirs_NLF, own_NLG, held_out_N)
            if self._control is not None:
                own_NLG = own_NLG[other_N[paired_N]]
                self._add(self._control, tensor, theirs_NLF[paired_N], own_NLG, held_out_N[paired_N])

    def _rows(self, kv: BatchKV, student: StudentRead | None) -> _Rows:
        if not self._aligner.needs_student:
            return _all_rows(self._aligner, kv, student)
        assert student is not None, "fitting needs the student's own K/V"
        if self._aligner.fits_adapter:
            rows = _paired_rows(self._aligner, kv, student)
            self._count_coverage(kv, student, len(rows.sample_N))
            return rows
        _, sample_N, _, _ = _pairs(self._aligner, kv, student.byte_ends_BT)
        self._count_coverage(kv, student, len(sample_N))
        return _all_rows(self._aligner, kv, student)

    def _add(
        self, parts: tuple[Statistics, Statistics], tensor: TensorKind, theirs: Tensor, own: Tensor, held_out_N: Tensor
    ) -> None:
        x_NLF, y_NLG = (theirs, own) if self._aligner.direction == "to_student" else (own, theirs)
        for part, rows_N in zip(parts, (~held_out_N, held_out_N), strict=True):
            x_part, y_part = x_NLF[rows_N].double(), y_NLG[rows_N].double()
            for layer, statistics in enumerate(part[tensor]):
                statistics.update(x_part[:, layer], y_part[:, layer])

    def _count_coverage(self, kv: BatchKV, student: StudentRead, paired: int) -> None:
        """Counts the tokens and slots that stand for text, except sinks, and those of them that are paired."""
        skip, device = self._aligner.sink_tokens, kv.mask_BM.device
        ends_BT = student.byte_ends_BT.to(device)
        text_BT = beyond_first(ends_BT, skip) & kv.mask_BM.any(dim=1, keepdim=True)
        slots_BM = kv.mask_BM & (kv.byte_ends_BLHM[:, 0, 0] > sink_ends(ends_BT, skip)[:, None])
        # One feature is enough to learn which slots are paired.
        _, met_BLHM = at_teacher_slots(student.k_BLHTD[:, :1, :1, :, :1].to(device), ends_BT, kv, skip)
        text, slots, met = (int(part.sum()) for part in (text_BT, slots_BM, met_BLHM[:, 0, 0] & slots_BM))
        self._coverage_4 += torch.tensor([text, paired, slots, met], device=self._coverage_4.device)

    def tensors(self) -> list[Tensor]:
        """All sums; with several ranks, add them in place (all-reduce) before `finish`."""
        parts = (*self._true, *(self._control or ()))
        sums = [tensor for part in parts for name in TENSORS for layer in part[name] for tensor in layer.tensors()]
        return [self._coverage_4, *sums]

    def finish(self) -> None:
        """Fits the aligner's adapter, and measures its targets and the control.

        Raises:
            FieldError: too few rows, or targets that never vary.
            KVDistillError: keys or values are not finite.
        """
        self.fit()
        self.measure_control()

    def fit(self) -> None:
        """Fits the aligner's adapter to the rows so far, and measures its targets. More rows may follow.

        Raises:
            FieldError: too few rows, or targets that never vary.
            KVDistillError: keys or values are not finite.
        """
        _check_finite(self.tensors())
        fit, held_out = self._true
        counts = _counts(self._true)
        if min(counts) < _FEWEST_ROWS:
            found = f"{counts[0]} token pairs to fit on and {counts[1]} held out"
            raise FieldError("align.calibration_samples", _too_few(found))
        self._aligner.rows_2.copy_(torch.tensor(counts))
        self._aligner.coverage_4.copy_(self._coverage_4)
        if self._aligner.fits_adapter:
            for tensor in TENSORS:
                self._aligner.adapter.fit(tensor, fit[tensor], held_out[tensor])
        for column, tensor in enumerate(TENSORS):
            for layer, (seen, unseen) in enumerate(zip(fit[tensor], held_out[tensor], strict=True)):
                self._measure_targets(column, layer, seen.merged(unseen))

    def measure_control(self) -> None:
        """Measures what the adapter explains with the student's rows of another sample, after `fit`."""
        if self._control is None or min(_counts(self._control)) < _FEWEST_ROWS:
            return
        fit, held_out = self._control
        adapter: HeadDimAdapter = copy.deepcopy(self._aligner.adapter)
        for column, tensor in enumerate(TENSORS):
            adapter.fit(tensor, fit[tensor], held_out[tensor])
            self._aligner.shuffled_LK[:, column] = torch.tensor(adapter.explained_variance(tensor))

    def _measure_targets(self, column: int, layer: int, rows: RidgeStatistics) -> None:
        """Measures each feature's mean, the deviation of all elements, and the mean variance around the means."""
        mean_G, variance_G = self._target_moments(TENSORS[column], layer, rows)
        square, variance = float((variance_G + mean_G.square()).mean()), float(variance_G.mean())
        if not variance > 1e-12 * square:
            raise FieldError(
                "align.calibration_samples",
                f"the targets of student layer {layer} ({TENSORS[column]}) do not vary; use more samples",
            )
        aligner = self._aligner
        aligner.mean_KLHD[column, layer] = mean_G.view_as(aligner.mean_KLHD[column, layer])
        aligner.scale_LK[layer, column] = math.sqrt(square - float(mean_G.mean()) ** 2)
        aligner.variance_LK[layer, column] = variance

    def _target_moments(self, tensor: TensorKind, layer: int, rows: RidgeStatistics) -> tuple[Tensor, Tensor]:
        """Mean and variance of each feature of one layer's targets, from the statistics."""
        if self._aligner.direction == "to_teacher":
            return rows.mean_y, rows.scatter_yy() / rows.count
        covariance_FF = rows.scatter_xx() / rows.count
        affine = self._aligner.adapter.layer_map(tensor, layer)
        if affine is None:
            return rows.mean_x, covariance_FF.diagonal()
        weight_FG, bias_G = (part.double() for part in affine)
        return rows.mean_x @ weight_FG + bias_G, (weight_FG * (covariance_FF @ weight_FG)).sum(dim=0)


def row_of_another_sample(sample_N: Tensor) -> Tensor:
    """For each row, the row at the same place in the next sample; the first sample follows the last.

    Args:
        sample_N: each row's sample, ascending.

    Returns:
        int64 [N]; -1 if that sample has too few rows, or there is only one sample. No row occurs twice.
    """
    _, part_N, counts_P = torch.unique_consecutive(sample_N, return_inverse=True, return_counts=True)
    if len(counts_P) < 2:
        return torch.full_like(sample_N, -1)
    starts_P = counts_P.cumsum(dim=0) - counts_P
    place_N = torch.arange(len(sample_N), device=sample_N.device) - starts_P[part_N]
    next_N = (part_N + 1) % len(counts_P)
    return torch.where(place_N < counts_P[next_N], starts_P[next_N] + place_N, -1)


def _paired_rows(aligner: Aligner, kv: BatchKV, student: StudentRead) -> _Rows:
    """Features of both models at the student's tokens; the teacher's layers are mapped if the map is known."""
    kv, sample_N, slot_N, token_N = _pairs(aligner, kv, student.byte_ends_BT)
    mapped = (lambda x_BLHMD: x_BLHMD) if aligner.needs_layer_pass else aligner.map_layers
    own: dict[TensorKind, Tensor] = {"k": student.k_BLHTD, "v": student.v_BLHTD}
    return _Rows(
        sample_N,
        {tensor: _features(mapped(x_BLHMD), sample_N, slot_N) for tensor, x_BLHMD in _both(kv).items()},
        {tensor: _features(x_BLHTD, sample_N, token_N) for tensor, x_BLHTD in own.items()},
    )


def _pairs(aligner: Aligner, kv: BatchKV, ends_BT: Tensor) -> tuple[BatchKV, Tensor, Tensor, Tensor]:
    """The teacher's K/V, and each row's sample, slot and student token."""
    ends_BT = ends_BT.to(kv.mask_BM.device)
    if aligner.tokens == "overlap":
        kv = at_student_tokens(kv, ends_BT, aligner.tokens, aligner.sink_tokens)
        sample_N, token_N = kv.mask_BM.nonzero(as_tuple=True)
        return kv, sample_N, token_N, token_N
    # Selected one by one: a selection usually has far fewer slots than the student has tokens.
    index_BT = slots_of_tokens(kv, ends_BT.masked_fill(~beyond_first(ends_BT, aligner.sink_tokens), -1))
    sample_N, token_N = (index_BT >= 0).nonzero(as_tuple=True)
    return kv, sample_N, index_BT[sample_N, token_N], token_N


def _all_rows(aligner: Aligner, kv: BatchKV, student: StudentRead | None) -> _Rows:
    """All of the teacher's slots; without sink tokens if the student's tokens are given."""
    mask_BM = kv.mask_BM
    if student is not None:
        mask_BM = slots_beyond_sinks(kv, student.byte_ends_BT, aligner.sink_tokens)
    sample_N, slot_N = mask_BM.nonzero(as_tuple=True)
    return _Rows(
        sample_N,
        {tensor: _features(aligner.map_layers(x), sample_N, slot_N) for tensor, x in _both(kv).items()},
        {},
    )


def _both(kv: BatchKV) -> dict[TensorKind, Tensor]:
    return {"k": kv.k_BLHMD, "v": kv.v_BLHMD}


def _features(x_BLHMD: Tensor, sample_N: Tensor, place_N: Tensor) -> Tensor:
    """Features [N,L,F] of chosen tokens: all heads concatenated."""
    return x_BLHMD[sample_N, :, :, place_N].flatten(2)


def _counts(parts: tuple[Statistics, Statistics]) -> list[int]:
    return [int(part["k"][0].count) for part in parts]


def _check_finite(sums: list[Tensor]) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in sums):
        raise KVDistillError(
            "keys or values of the calibration samples are NaN or infinite; fp16 may overflow (use --dtype bf16)"
        )


def _too_few(found: str) -> str:
    return (
        f"gave {found}, but at least {_FEWEST_ROWS} of each are needed; use more samples, or check that teacher and "
        "student read the same texts"
    )
