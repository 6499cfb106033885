"""One teacher and the student in one space: targets, calibration, scale, pairing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from align.aligner import Aligner, gather_slots, slots_of_tokens
from align.calibration import HOLD_OUT_EVERY, Calibration, StudentRead
from align.head_dim_adapter import TENSORS, KVGeometry, TensorKind
from kvcore.errors import ConfigError, FieldError
from kvcore.types import BatchKV

TEACHER, STUDENT = KVGeometry(5, 2, 4), KVGeometry(3, 3, 2)
MIXING = KVGeometry(4, 2, 4)
SLOT_ENDS, TOKEN_ENDS = (3, 5, 9), (1, 3, 4, 9, -1, 11)
PAIRS = ((0, 1), (2, 3))  # slot, token


def teacher_batch(samples: int, layers: int, seed: int, geometry: KVGeometry = TEACHER) -> BatchKV:
    """Random K/V in three slots that end at SLOT_ENDS; the last slot of every third sample is empty and holds NaN."""
    generator = torch.Generator().manual_seed(seed)
    shape = (samples, layers, geometry.heads, len(SLOT_ENDS), geometry.head_dim)
    k, v = 2 * torch.randn(shape, generator=generator) + 1, torch.randn(shape, generator=generator) - 3
    mask = torch.ones(samples, len(SLOT_ENDS), dtype=torch.bool)
    mask[::3, -1] = False
    spoil = ~mask[:, None, None, :, None]
    ends = torch.tensor(SLOT_ENDS).expand(samples, 1, 1, -1).clone()
    return BatchKV(k.masked_fill(spoil, math.nan), v.masked_fill(spoil, math.nan), mask, ends)


def naive_layer_mix(aligner: Aligner, kv: torch.Tensor) -> torch.Tensor:
    order = {layer: place for place, layer in enumerate(aligner.layers_needed)}
    rows = [sum(weight * kv[:, order[layer]] for layer, weight in row) for row in aligner.mapper.get_mapping().values()]
    return torch.stack(rows, dim=1)  # type: ignore[arg-type]


def student_read(aligner: Aligner, kv: BatchKV, seed: int, noise: float = 0.0) -> StudentRead:
    """A student whose K/V at paired tokens are a map of the teacher's, another in every layer; noise elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.Generator().manual_seed(7)
    samples = len(kv.mask_BM)
    read: dict[str, torch.Tensor] = {}
    for tensor, x in (("k", kv.k_BLHMD), ("v", kv.v_BLHMD)):
        assert x is not None
        mixed = naive_layer_mix(aligner, x)
        out = 9 * torch.randn(
            samples, STUDENT.layers, STUDENT.heads, len(TOKEN_ENDS), STUDENT.head_dim, generator=generator
        )
        for layer in range(STUDENT.layers):
            weight = torch.randn(TEACHER.features, STUDENT.features, generator=truth)
            for slot, token in PAIRS:
                rows = mixed[:, layer, :, slot].flatten(1) @ weight - 2.0
                rows = rows + noise * torch.randn(rows.shape, generator=generator)
                rows = rows.unflatten(1, (STUDENT.heads, STUDENT.head_dim))
                out[:, layer, :, token] = torch.where(rows.isnan(), out[:, layer, :, token], rows)
        read[tensor] = out
    return StudentRead(read["k"], read["v"], torch.tensor(TOKEN_ENDS).expand(samples, -1))


def calibrated(aligner: Aligner, samples: int = 200, noise: float = 0.0) -> tuple[Aligner, BatchKV, StudentRead]:
    kv = teacher_batch(samples, len(aligner.layers_needed), seed=1, geometry=aligner.teacher)
    read = student_read(aligner, kv, seed=2, noise=noise)
    calibration = Calibration(aligner)
    calibration.update(kv, torch.arange(samples), read)
    calibration.finish()
    return aligner, kv, read


def paired_rows(kv: BatchKV, x_BLHMD: torch.Tensor, place: int) -> np.ndarray:
    """[N,L,F] of the rows that calibration uses, one by one; `place` 0 takes slots, 1 tokens."""
    rows = [
        x_BLHMD[b, :, :, pair[place]].detach().flatten(1)
        for b in range(len(kv.mask_BM))
        for pair in PAIRS
        if kv.mask_BM[b, pair[0]]
    ]
    return torch.stack(rows).double().numpy()


@pytest.mark.parametrize("teacher", [TEACHER, MIXING])
def test_to_student_finds_the_map_between_the_models(teacher: KVGeometry) -> None:
    aligner = Aligner(teacher, STUDENT)
    assert aligner.mapper.mixes_layers == (teacher is MIXING)
    aligner, kv, read = calibrated(aligner)
    targets = aligner.targets(kv)
    for tensor, target, own in zip(TENSORS, targets, (read.k_BLHTD, read.v_BLHTD), strict=True):
        assert target.shape == (200, STUDENT.layers, STUDENT.heads, 3, STUDENT.head_dim)
        np.testing.assert_allclose(paired_rows(kv, target, 0), paired_rows(kv, own, 1), atol=2e-3)
        assert min(aligner.adapter.explained_variance(tensor)) > 0.9999
        assert torch.equal(aligner.student_view(own, tensor), own)
        assert not target.requires_grad


def test_identity_between_equal_models_changes_nothing() -> None:
    geometry = KVGeometry(4, 2, 4)
    aligner = Aligner(geometry, geometry, head_adapter="identity")
    assert aligner.layers_needed == (0, 1, 2, 3)
    assert not aligner.needs_student
    kv = teacher_batch(4, 4, seed=0)
    k, v = aligner.targets(kv)
    for given, target in ((kv.k_BLHMD, k), (kv.v_BLHMD, v)):
        assert given is not None
        assert torch.equal(given.nan_to_num(9.0), target.nan_to_num(9.0))


def test_to_teacher_keeps_the_target_and_maps_the_student_with_gradient() -> None:
    aligner, kv, read = calibrated(Aligner(MIXING, STUDENT, direction="to_teacher"))
    assert kv.k_BLHMD is not None
    target = aligner.targets(kv)[0]
    np.testing.assert_allclose(
        paired_rows(kv, target, 0), paired_rows(kv, naive_layer_mix(aligner, kv.k_BLHMD), 0), atol=1e-6
    )
    own = read.k_BLHTD.clone().requires_grad_()
    view = aligner.student_view(own, "k")
    assert view.shape == (200, STUDENT.layers, MIXING.heads, len(TOKEN_ENDS), MIXING.head_dim)
    view.square().mean().backward()
    assert not target.requires_grad
    assert own.grad is not None
    assert own.grad.abs().sum() > 0
    trained = [name for name, parameter in aligner.named_parameters() if parameter.grad is not None]
    assert len(trained) == 2


def test_to_teacher_starts_from_the_closed_form() -> None:
    aligner, kv, read = calibrated(Aligner(TEACHER, STUDENT, direction="to_teacher"))
    x, y = paired_rows(kv, read.k_BLHTD, 1), paired_rows(kv, aligner.targets(kv)[0], 0)
    view = paired_rows(kv, aligner.student_view(read.k_BLHTD, "k"), 1)
    for layer in range(STUDENT.layers):
        augmented = np.hstack([x[:, layer], np.ones((len(x), 1))])
        best = np.linalg.lstsq(augmented, y[:, layer], rcond=None)[0]
        least = np.square(augmented @ best - y[:, layer]).sum()
        assert np.square(view[:, layer] - y[:, layer]).sum() < 1.1 * least


@pytest.mark.parametrize("direction", ["to_student", "to_teacher"])
@pytest.mark.parametrize("teacher", [TEACHER, MIXING])
def test_scale_and_variance_are_those_of_the_targets(direction: str, teacher: KVGeometry) -> None:
    aligner, kv, _ = calibrated(Aligner(teacher, STUDENT, direction=direction), noise=1.0)
    for tensor, target in zip(TENSORS, aligner.targets(kv), strict=True):
        rows = paired_rows(kv, target, 0)
        np.testing.assert_allclose(aligner.scale(tensor), rows.std(axis=(0, 2)), rtol=1e-4)
        np.testing.assert_allclose(aligner.variance(tensor), rows.var(axis=0).mean(axis=1), rtol=1e-4)
        # What a student that predicts each feature's mean scores, normalised.
        error = np.square(rows - rows.mean(axis=0)).mean(axis=(0, 2)) / aligner.variance(tensor).numpy()
        np.testing.assert_allclose(error, 1.0, rtol=1e-4)
    assert not torch.allclose(aligner.scale("k"), aligner.scale("v"))


@pytest.mark.parametrize("scope", ["sample", "head"])
def test_identity_measures_scale_over_all_slots_whatever_token_a_head_keeps(scope: str) -> None:
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
    # The fit never saw the spoiled rows, the judgement did.
    assert max(aligner.adapter.explained_variance("k")) < 0
    assert min(aligner.adapter.explained_variance("v")) > 0.9999
    weight, _ = aligner.adapter.layer_map("k", 0) or (None, None)
    assert weight is not None
    kept = ~held_out
    x = [kv.k_BLHMD[kept][:, 0, :, s][kv.mask_BM[kept][:, s]].flatten(1) for s, _ in PAIRS]  # type: ignore[index]
    y = [read.k_BLHTD[kept][:, 0, :, t][kv.mask_BM[kept][:, s]].flatten(1) for s, t in PAIRS]
    augmented = torch.cat([torch.cat(x), torch.ones(len(torch.cat(x)), 1)], dim=1).double()
    exact = torch.linalg.lstsq(augmented, torch.cat(y).double()).solution[:-1]
    alpha = aligner.adapter.alpha("k")[0]
    assert torch.corrcoef(torch.stack([weight.flatten().double(), exact.flatten()]))[0, 1] > 0.99, alpha


def test_ranks_and_batches_add_up_to_one_calibration() -> None:
    whole, kv, read = calibrated(Aligner(TEACHER, STUDENT), noise=0.5)

    def part(aligner: Aligner, numbers: range) -> Calibration:
        calibration = Calibration(aligner)
        for start in range(0, len(numbers), 30):
            chosen = torch.tensor(numbers[start : start + 30])
            assert kv.k_BLHMD is not None
            assert kv.v_BLHMD is not None
            batch = BatchKV(kv.k_BLHMD[chosen], kv.v_BLHMD[chosen], kv.mask_BM[chosen], kv.byte_ends_BLHM[chosen])
            own = StudentRead(read.k_BLHTD[chosen], read.v_BLHTD[chosen], read.byte_ends_BT[chosen])
            calibration.update(batch, chosen, own)
        return calibration

    reduced = Aligner(TEACHER, STUDENT)
    first, second = part(reduced, range(0, 200, 2)), part(reduced, range(1, 200, 2))
    for mine, theirs in zip(first.tensors(), second.tensors(), strict=True):
        mine.add_(theirs)
    first.finish()
    assert reduced.report()["rows"] == whole.report()["rows"]
    for name, tensor in whole.state_tensors().items():
        # Which rows face which in the control is the batches' affair.
        if name == "shuffled_LK":
            continue
        torch.testing.assert_close(reduced.state_tensors()[name], tensor, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_too_few_pairs_are_refused_by_the_fields_name() -> None:
    aligner = Aligner(TEACHER, STUDENT)
    kv = teacher_batch(40, 3, seed=1)
    read = student_read(aligner, kv, seed=2)
    elsewhere = StudentRead(read.k_BLHTD, read.v_BLHTD, read.byte_ends_BT + 20)
    calibration = Calibration(aligner)
    calibration.update(kv, torch.arange(40), elsewhere)
    with pytest.raises(FieldError, match="0 token pairs") as caught:
        calibration.finish()
    assert caught.value.field == "align.calibration_samples"


def test_targets_that_never_vary_are_refused() -> None:
    aligner = Aligner(TEACHER, STUDENT, direction="to_teacher")
    kv = teacher_batch(40, 3, seed=1)
    read = student_read(aligner, kv, seed=2)
    assert kv.v_BLHMD is not None
    kv.v_BLHMD[:, 2] = 0.25
    calibration = Calibration(aligner)
    calibration.update(kv, torch.arange(40), read)
    with pytest.raises(FieldError, match=r"student layer 2 \(v\)"):
        calibration.finish()


def test_nothing_comes_out_as_a_number_before_calibration() -> None:
    aligner = Aligner(TEACHER, STUDENT)
    assert all(x.isnan().all() for x in aligner.targets(teacher_batch(2, 3, seed=0)))
    assert aligner.scale("k").isnan().all()
    assert aligner.variance("v").isnan().all()


@pytest.mark.parametrize("direction", ["to_student", "to_teacher"])
def test_state_survives_a_safetensors_file(direction: str, tmp_path: Path) -> None:
    aligner, kv, read = calibrated(Aligner(TEACHER, STUDENT, direction=direction), noise=1.0)
    save_file(aligner.state_tensors(), tmp_path / "a.safetensors")
    loaded = Aligner(TEACHER, STUDENT, direction=direction)
    loaded.load_state_tensors(load_file(tmp_path / "a.safetensors"))
    assert loaded.report() == aligner.report()
    for one, other in zip(aligner.targets(kv), loaded.targets(kv), strict=True):
        assert torch.equal(one.nan_to_num(9.0), other.nan_to_num(9.0))
    assert torch.equal(aligner.student_view(read.v_BLHTD, "v"), loaded.student_view(read.v_BLHTD, "v"))
    with pytest.raises(ConfigError, match="other models"):
        Aligner(TEACHER, KVGeometry(3, 2, 2), direction=direction).load_state_tensors(aligner.state_tensors())


def test_the_report_is_json_and_says_what_was_done() -> None:
    aligner, _, _ = calibrated(Aligner(MIXING, STUDENT), noise=1.0)
    report = json.loads(json.dumps(aligner.report(), allow_nan=False))
    assert report["direction"] == "to_student"
    assert report["head_adapter"] == "ridge"
    assert report["layer_map"] == {"0": [[0, 1.0]], "1": [[1, 0.5], [2, 0.5]], "2": [[3, 1.0]]}
    for tensor in TENSORS:
        assert len(report["explained_variance"][tensor]) == len(report["alpha"][tensor]) == STUDENT.layers
        assert report["scale"][tensor] == aligner.scale(tensor).tolist()
    json.dumps(Aligner(MIXING, STUDENT).report()["explained_variance"], allow_nan=False)


@pytest.mark.parametrize(
    ("teacher", "adapter", "refused"),
    [
        (KVGeometry(3, 3, 2), "identity", ()),
        (KVGeometry(4, 3, 2), "identity", ("head", "layer")),
        (KVGeometry(3, 3, 2), "ridge", ("head", "layer")),
        (KVGeometry(4, 3, 2), "ridge", ("head", "layer")),
    ],
)
def test_a_scope_whose_slots_hold_different_tokens_where_they_are_mixed_is_refused(
    teacher: KVGeometry, adapter: str, refused: tuple[str, ...]
) -> None:
    aligner = Aligner(teacher, STUDENT, head_adapter=adapter)
    for scope in ("head", "layer", "sample"):
        if scope in refused:
            with pytest.raises(FieldError, match=f"not '{scope}'") as caught:
                aligner.check_scope(scope)
            assert caught.value.field == "kv.selection.scope"
        else:
            aligner.check_scope(scope)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(FieldError, match="sideways"):
        Aligner(TEACHER, STUDENT, direction="sideways")
    with pytest.raises(FieldError, match="to_student"):
        Aligner(STUDENT, STUDENT, direction="to_teacher", head_adapter="identity")
    with pytest.raises(FieldError, match="identity"):
        Aligner(TEACHER, STUDENT, head_adapter="identity")


def test_student_tokens_find_the_slot_that_ends_at_their_byte() -> None:
    kv = teacher_batch(4, 3, seed=0)
    kv.byte_ends_BLHM[1] = torch.tensor([4, -1, 11])
    index_BT = slots_of_tokens(kv, torch.tensor(TOKEN_ENDS).expand(4, -1))
    # Sample 0 and 3 have an empty last slot, which would have ended at 9.
    assert index_BT.tolist() == [
        [-1, 0, -1, -1, -1, -1],
        [-1, -1, 0, -1, -1, 2],
        [-1, 0, -1, 2, -1, -1],
        [-1, 0, -1, -1, -1, -1],
    ]


@pytest.mark.parametrize("tensor", TENSORS)
def test_gathering_lays_the_teachers_slots_at_the_students_tokens(tensor: TensorKind) -> None:
    kv = teacher_batch(3, 2, seed=5)
    x = kv.k_BLHMD if tensor == "k" else kv.v_BLHMD
    assert x is not None
    index_BT = torch.tensor([[1, 0, -1, 1], [-1, -1, -1, 2], [2, 1, 0, -1]])
    out = gather_slots(x, index_BT)
    assert out.shape == (3, 2, TEACHER.heads, 4, TEACHER.head_dim)
    for b in range(3):
        for t in range(4):
            slot = int(index_BT[b, t])
            expected = x[b, :, :, slot] if slot >= 0 else torch.zeros(2, TEACHER.heads, TEACHER.head_dim)
            assert torch.equal(out[b, :, :, t], expected)
