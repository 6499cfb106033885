"""Compares an alignment that is calibrated from streamed rows with statistics of all rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.aligner import Aligner
from align.calibration import HOLD_OUT_EVERY, Calibration, LayerCalibration, StudentRead, row_of_another_sample
from align.head_dim_adapter import KVGeometry
from kvcore.errors import FieldError, KVDistillError
from kvcore.types import TENSORS, BatchKV
from tests.support.alignment_parts import (
    MIXING,
    PAIRS,
    STUDENT,
    TEACHER,
    TOKEN_ENDS,
    calibrate_on,
    calibrated,
    paired_rows,
    student_read,
    teacher_batch,
)

CalibrationKind = type[Calibration] | type[LayerCalibration]


def rows_of_batch(kv: BatchKV, read: StudentRead, chosen: Sequence[int]) -> tuple[BatchKV, StudentRead]:
    """Selects samples of a batch."""
    b = torch.tensor(chosen)
    return kv[b], StudentRead(read.k_BLHTD[b], read.v_BLHTD[b], read.byte_ends_BT[b])


@pytest.mark.parametrize("direction", ["to_student", "to_teacher"])
@pytest.mark.parametrize("teacher", [TEACHER, MIXING])
def test_scale_and_variance_match_the_targets(direction: str, teacher: KVGeometry) -> None:
    aligner, kv, _ = calibrated(Aligner(teacher, STUDENT, direction=direction), noise=1.0)
    for tensor, target in zip(TENSORS, aligner.targets(kv), strict=True):
        rows = paired_rows(kv, target, 0)
        np.testing.assert_allclose(aligner.scale(tensor), rows.std(axis=(0, 2)), rtol=1e-4)
        np.testing.assert_allclose(aligner.variance(tensor), rows.var(axis=0).mean(axis=1), rtol=1e-4)
        # A student that predicts the mean of each feature has a normalised error of 1.
        error = np.square(rows - rows.mean(axis=0)).mean(axis=(0, 2)) / aligner.variance(tensor).numpy()
        np.testing.assert_allclose(error, 1.0, rtol=1e-4)
    assert not torch.allclose(aligner.scale("k"), aligner.scale("v"))


@pytest.mark.parametrize("scope", ["sample", "head"])
def test_identity_measures_scale_over_all_slots(scope: str) -> None:
    geometry = KVGeometry(2, 2, 4)
    aligner = Aligner(geometry, geometry, head_adapter="identity")
    kv = teacher_batch(30, 2, seed=3, geometry=geometry)
    if scope == "head":
        kv.byte_ends_BLHM = kv.byte_ends_BLHM.expand(30, 2, 2, -1)
    calibration = Calibration(aligner)
    calibration.update(kv, torch.arange(30))
    calibration.finish()
    for tensor, target in zip(TENSORS, aligner.targets(kv), strict=True):
        rows = torch.stack([target[b, :, :, m].flatten(1) for b in range(30) for m in range(3) if kv.mask_BM[b, m]])
        np.testing.assert_allclose(aligner.scale(tensor), rows.double().numpy().std(axis=(0, 2)), rtol=1e-5)
        np.testing.assert_allclose(aligner.variance(tensor), rows.double().numpy().var(axis=0).mean(axis=1), rtol=1e-5)


def test_every_fifth_sample_is_held_out_from_the_fit() -> None:
    aligner = Aligner(TEACHER, STUDENT)
    kv = teacher_batch(200, 3, seed=1)
    read = student_read(aligner, kv, seed=2)
    spoiled = student_read(aligner, kv, seed=2)
    held_out = torch.arange(200) % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1
    spoiled.k_BLHTD[held_out] = torch.randn(spoiled.k_BLHTD[held_out].shape)
    calibration = Calibration(aligner)
    calibration.update(kv, torch.arange(200), spoiled)
    calibration.finish()
    rows = aligner.report()["rows"]
    assert rows["fit"] == sum(int(kv.mask_BM[b, slot]) for b in range(200) if not held_out[b] for slot, _ in PAIRS)
    assert rows["held_out"] == sum(int(kv.mask_BM[b, slot]) for b in range(200) if held_out[b] for slot, _ in PAIRS)
    # Only the held-out rows are spoiled, so the fit is exact and the explained variance is negative.
    assert max(aligner.adapter.explained_variance("k")) < 0
    assert min(aligner.adapter.explained_variance("v")) > 0.9999
    weight, _ = aligner.adapter.layer_map("k", 0) or (None, None)
    assert weight is not None
    kept = ~held_out
    x = [kv.k_BLHMD[kept][:, 0, :, s][kv.mask_BM[kept][:, s]].flatten(1) for s, _ in PAIRS]
    y = [read.k_BLHTD[kept][:, 0, :, t][kv.mask_BM[kept][:, s]].flatten(1) for s, t in PAIRS]
    augmented = torch.cat([torch.cat(x), torch.ones(len(torch.cat(x)), 1)], dim=1).double()
    exact = torch.linalg.lstsq(augmented, torch.cat(y).double()).solution[:-1]
    alpha = aligner.adapter.alpha("k")[0]
    assert torch.corrcoef(torch.stack([weight.flatten().double(), exact.flatten()]))[0, 1] > 0.99, alpha


@pytest.mark.parametrize("layer_map", ["ratio", "cka"])
def test_calibration_does_not_depend_on_ranks_or_batches(layer_map: str) -> None:
    whole, kv, read = calibrated(Aligner(TEACHER, STUDENT, layer_map=layer_map), noise=0.5)
    reduced = Aligner(TEACHER, STUDENT, layer_map=layer_map)

    def calibrate_on_two_ranks(kind: CalibrationKind) -> None:
        ranks = [kind(reduced), kind(reduced)]
        for rank, calibration in enumerate(ranks):
            numbers = range(rank, 200, 2)
            for start in range(0, len(numbers), 30):
                chosen = numbers[start : start + 30]
                calibration.update(*_numbered_rows(kv, read, chosen))
        for mine, theirs in zip(ranks[0].tensors(), ranks[1].tensors(), strict=True):
            mine.add_(theirs)
        ranks[0].finish()

    kinds: list[CalibrationKind] = [LayerCalibration, Calibration] if layer_map == "cka" else [Calibration]
    for kind in kinds:
        calibrate_on_two_ranks(kind)
    assert reduced.report()["rows"] == whole.report()["rows"]
    assert reduced.report()["coverage"] == whole.report()["coverage"]
    for name, tensor in whole.state_tensors().items():
        # The pairs of the control depend on the batches.
        if name != "shuffled_LK":
            torch.testing.assert_close(reduced.state_tensors()[name], tensor, rtol=1e-4, atol=1e-5, equal_nan=True)


def _numbered_rows(kv: BatchKV, read: StudentRead, chosen: Sequence[int]) -> tuple[BatchKV, torch.Tensor, StudentRead]:
    part, own = rows_of_batch(kv, read, chosen)
    return part, torch.tensor(chosen), own


def test_too_few_pairs_raise_field_error() -> None:
    aligner = Aligner(TEACHER, STUDENT)
    kv = teacher_batch(40, 3, seed=1)
    read = student_read(aligner, kv, seed=2)
    unaligned = StudentRead(read.k_BLHTD, read.v_BLHTD, read.byte_ends_BT + 20)
    calibration = Calibration(aligner)
    calibration.update(kv, torch.arange(40), unaligned)
    with pytest.raises(FieldError, match="0 token pairs") as caught:
        calibration.finish()
    assert caught.value.field == "align.calibration_samples"


def test_constant_targets_are_refused() -> None:
    aligner = Aligner(TEACHER, STUDENT, direction="to_teacher")
    kv = teacher_batch(40, 3, seed=1)
    read = student_read(aligner, kv, seed=2)
    kv.v_BLHMD[:, 2] = 0.25
    calibration = Calibration(aligner)
    calibration.update(kv, torch.arange(40), read)
    with pytest.raises(FieldError, match=r"student layer 2 \(v\)"):
        calibration.finish()


def test_too_few_pairs_for_layer_map_raise_field_error() -> None:
    aligner = Aligner(TEACHER, STUDENT, layer_map="cka")
    calibration = LayerCalibration(aligner)
    with pytest.raises(FieldError, match="0 token pairs") as caught:
        calibration.finish()
    assert caught.value.field == "align.calibration_samples"
    assert aligner.needs_layer_pass


@pytest.mark.parametrize("layer_map", ["ratio", "cka"])
def test_non_finite_kv_is_refused(layer_map: str) -> None:
    aligner = Aligner(TEACHER, STUDENT, layer_map=layer_map)
    kv = teacher_batch(40, len(aligner.layers_needed), seed=1)
    read = student_read(aligner, kv, seed=2)
    read.v_BLHTD[7, 1, 0, PAIRS[0][1], 0] = torch.inf
    with pytest.raises(KVDistillError, match="NaN or infinite"):
        calibrate_on(aligner, kv, read)


@pytest.mark.parametrize("sink_tokens", [0, 1, 2])
def test_sinks_are_excluded_from_fit_and_layer_map(sink_tokens: int) -> None:
    """The first pair is at the second text token, so changing that token has an effect only if it is not a sink."""
    found: list[dict[str, Any]] = []
    for spoiled in (False, True):
        aligner = Aligner(TEACHER, STUDENT, layer_map="cka", sink_tokens=sink_tokens)
        kv = teacher_batch(100, 5, seed=1)
        read = student_read(aligner, kv, seed=2)
        if spoiled:
            read.k_BLHTD[:, :, :, 1] = 50.0
        found.append(calibrate_on(aligner, kv, read).report())
    same = sink_tokens == 2
    assert (found[0]["cka"] == found[1]["cka"]) == same
    assert (found[0]["explained_variance"] == found[1]["explained_variance"]) == same
    pairs = [pair for pair in PAIRS if pair[1] >= sink_tokens]
    filled = sum(int(kv.mask_BM[b, slot]) for b in range(100) for slot, _ in pairs)
    assert sum(found[0]["rows"].values()) == filled


@pytest.mark.parametrize("sink_tokens", [0, 2])
def test_overlap_fits_on_the_mean_of_slots_that_share_bytes(sink_tokens: int) -> None:
    """Equals a fit on teacher K/V averaged by hand over the slots that share bytes with each student token."""
    kv = teacher_batch(100, 3, seed=1)
    read = student_read(Aligner(TEACHER, STUDENT), kv, seed=2)
    mixed = [torch.zeros(100, 3, TEACHER.heads, 4, TEACHER.head_dim) for _ in range(2)]
    for x, out in zip((kv.k_BLHMD, kv.v_BLHMD), mixed, strict=True):
        assert x is not None
        first, second, third = (x[:, :, :, slot] for slot in range(3))
        # Student tokens end at 2, 4, 6 and 9. Teacher slots end at 3, 5 and, if the third slot is filled, 9.
        out[:, :, :, 0] = first
        out[:, :, :, 1] = (first + second) / 2
        out[:, :, :, 2] = torch.where(kv.mask_BM[:, None, None, 2:], (second + third) / 2, second)
        out[:, :, :, 3] = third.nan_to_num(0.0)
    mask_BM = torch.ones(100, 4, dtype=torch.bool)
    mask_BM[:, 3] = kv.mask_BM[:, 2]
    ends_BT = torch.tensor([2, 4, 6, 9]).expand(100, -1)
    own = StudentRead(read.k_BLHTD[:, :, :, :4], read.v_BLHTD[:, :, :, :4], ends_BT)
    by_hand = calibrate_on(
        Aligner(TEACHER, STUDENT, sink_tokens=sink_tokens),
        BatchKV(mixed[0], mixed[1], mask_BM, ends_BT[:, None, None]),
        own,
    )
    aligner = calibrate_on(Aligner(TEACHER, STUDENT, tokens="overlap", sink_tokens=sink_tokens), kv, own)
    assert aligner.report()["rows"] == by_hand.report()["rows"]
    for tensor in TENSORS:
        assert aligner.adapter.explained_variance(tensor) == pytest.approx(by_hand.adapter.explained_variance(tensor))
        torch.testing.assert_close(aligner.mean(tensor), by_hand.mean(tensor), rtol=1e-4, atol=1e-4)
    assert aligner.report()["coverage"]["student_tokens"]["paired"] == int(mask_BM[:, sink_tokens:].sum())


@pytest.mark.parametrize("sink_tokens", [0, 1, 2])
def test_identity_excludes_slots_up_to_the_end_of_the_sinks(sink_tokens: int) -> None:
    geometry = KVGeometry(2, 2, 4)
    aligner = Aligner(geometry, geometry, head_adapter="identity", sink_tokens=sink_tokens)
    kv = teacher_batch(30, 2, seed=3, geometry=geometry)
    # An end of -1 is a start token without text, or a token in mid-text whose end is not known. In sample 1, the
    # teacher's tokens end at other bytes than the student's.
    kv.byte_ends_BLHM[:, 0, 0] = torch.tensor([-1, 3, -1])
    kv.byte_ends_BLHM[1, 0, 0] = torch.tensor([1, 2, 5])
    ends_BT = torch.tensor([[1, 3, 9]]).expand(30, -1)
    anything = torch.zeros(30, 2, 2, 3, 4)
    calibrate_on(aligner, kv, StudentRead(anything, anything, ends_BT))
    first, others = {0: (0, 0), 1: (1, 1), 2: (2, 2)}[sink_tokens]
    counted = [(b, m) for b in range(30) for m in range(first if b != 1 else others, 3) if kv.mask_BM[b, m]]
    assert sum(aligner.report()["rows"].values()) == len(counted)
    k = aligner.targets(kv)[0]
    rows = torch.stack([k[b, :, :, m].flatten(1) for b, m in counted]).double().numpy()
    np.testing.assert_allclose(aligner.scale("k"), rows.std(axis=(0, 2)), rtol=1e-5)
    assert aligner.report()["coverage"] is None


def test_coverage_counts_text_tokens_after_the_sinks() -> None:
    aligner, kv, _ = calibrated(Aligner(TEACHER, STUDENT), samples=60)
    filled = [[m for m in range(3) if kv.mask_BM[b, m]] for b in range(60)]
    text = [end for end in TOKEN_ENDS if end >= 0][1:]
    assert aligner.report()["coverage"] == {
        "student_tokens": {"seen": 60 * len(text), "paired": sum(m in row for row in filled for m, _ in PAIRS)},
        "teacher_slots": {"seen": sum(map(len, filled)), "paired": sum(m in row for row in filled for m, _ in PAIRS)},
    }


def test_coverage_excludes_samples_without_teacher_kv() -> None:
    aligner = Aligner(TEACHER, STUDENT)
    kv = teacher_batch(60, 3, seed=1)
    read = student_read(aligner, kv, seed=2)
    kv.mask_BM[::2] = False
    coverage = calibrate_on(aligner, kv, read).report()["coverage"]
    assert coverage["student_tokens"]["seen"] == 30 * 4
    assert coverage["teacher_slots"]["seen"] == int(kv.mask_BM.sum())


def test_coverage_is_counted_if_only_the_layer_map_needs_the_student() -> None:
    geometry = KVGeometry(3, 3, 2)
    aligner = Aligner(geometry, STUDENT, head_adapter="identity", layer_map="cka")
    kv = teacher_batch(60, 3, seed=1, geometry=geometry)
    own = teacher_batch(60, 3, seed=2, geometry=geometry)
    ends_BT = torch.tensor([1, 3, 9]).expand(60, -1)
    read = StudentRead(own.k_BLHMD.nan_to_num(0.5), own.v_BLHMD.nan_to_num(0.5), ends_BT)
    report = calibrate_on(aligner, kv, read).report()
    filled = int(kv.mask_BM.sum())
    assert report["coverage"] == {
        "student_tokens": {"seen": 120, "paired": filled - 60},
        "teacher_slots": {"seen": filled, "paired": filled - 60},
    }
    assert sum(report["rows"].values()) == filled
    assert report["explained_variance"] == report["explained_variance_shuffled"] == {"k": [], "v": []}


@given(st.lists(st.integers(0, 4), max_size=6))
def test_control_pairs_rows_at_the_same_place_of_the_next_sample(lengths: list[int]) -> None:
    rows = [(sample, place) for sample, length in enumerate(lengths) for place in range(length)]
    found = row_of_another_sample(torch.tensor([sample for sample, _ in rows], dtype=torch.int64)).tolist()
    filled = [sample for sample, length in enumerate(lengths) if length]
    for (sample, place), other in zip(rows, found, strict=True):
        after = [later for later in filled if later > sample] + filled
        partner = (after[0], place)
        assert other == (rows.index(partner) if partner in rows and after[0] != sample else -1)
    taken = [other for other in found if other >= 0]
    assert len(taken) == len(set(taken))


def test_control_is_fitted_on_student_rows_of_the_next_sample() -> None:
    """If the student's K/V are shifted by one sample, the control explains everything and the true pairs nothing."""
    aligner = Aligner(TEACHER, STUDENT)
    kv = teacher_batch(200, 3, seed=1)
    kv.mask_BM[:] = True
    for x in (kv.k_BLHMD, kv.v_BLHMD):
        assert x is not None
        x.nan_to_num_(0.5)
    read = student_read(aligner, kv, seed=2)
    late = StudentRead(read.k_BLHTD.roll(1, 0), read.v_BLHTD.roll(1, 0), read.byte_ends_BT)
    report = calibrate_on(aligner, kv, late).report()
    for tensor in TENSORS:
        assert min(report["explained_variance_shuffled"][tensor]) > 0.999
        assert max(report["explained_variance"][tensor]) < 0.2


@pytest.mark.parametrize("direction", ["to_student", "to_teacher"])
@pytest.mark.parametrize("adapter", ["ridge", "procrustes", "pool"])
def test_control_explains_less_variance_than_true_pairs(direction: str, adapter: str) -> None:
    if adapter == "pool":
        geometry = KVGeometry(3, 2, 4)
        aligner = Aligner(geometry, geometry, direction=direction, head_adapter=adapter)
        kv = teacher_batch(100, 3, seed=1, geometry=geometry)
        own = StudentRead(kv.k_BLHMD.clone(), kv.v_BLHMD.clone(), kv.byte_ends_BLHM[:, 0, 0])
        calibrate_on(aligner, kv, own)
    else:
        aligner, _, _ = calibrated(Aligner(TEACHER, STUDENT, direction=direction, head_adapter=adapter), noise=0.1)
    report = aligner.report()
    for tensor in TENSORS:
        pairs = zip(report["explained_variance"][tensor], report["explained_variance_shuffled"][tensor], strict=True)
        assert all(true > control + 0.3 for true, control in pairs)
        assert max(report["explained_variance_shuffled"][tensor]) < 0.1


def test_batches_of_one_sample_have_no_control() -> None:
    aligner = Aligner(TEACHER, STUDENT)
    kv = teacher_batch(20, 3, seed=1)
    read = student_read(aligner, kv, seed=2)
    calibration = Calibration(aligner)
    for number in range(20):
        calibration.update(*_numbered_rows(kv, read, [number]))
    calibration.finish()
    report = aligner.report()
    assert report["explained_variance_shuffled"] == {tensor: [None] * 3 for tensor in TENSORS}
    assert None not in report["explained_variance"]["k"]


def test_control_without_held_out_rows_is_nan() -> None:
    """Each held-out sample is the only one in its batch. The other samples are batched in pairs."""
    aligner = Aligner(TEACHER, STUDENT)
    kv = teacher_batch(20, 3, seed=1)
    read = student_read(aligner, kv, seed=2)
    calibration = Calibration(aligner)
    for first in range(0, 20, 5):
        for chosen in ([first, first + 1], [first + 2, first + 3], [first + 4]):
            calibration.update(*_numbered_rows(kv, read, chosen))
    calibration.finish()
    assert aligner.shuffled_LK.isnan().all()
    assert not aligner.variance_LK.isnan().any()
