"""Tests of the aligner of one teacher and the student: targets, views, saved state and plans."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from align.aligner import Aligner
from align.head_dim_adapter import KVGeometry
from align.teacher_plan import plan_for
from kvcore.errors import ConfigError, FieldError
from kvcore.plan import CodecSpec, KVPlan, Scope, Selection
from kvcore.types import TENSORS
from tests.support.alignment_parts import (
    CKA_PATH,
    MIXING,
    STUDENT,
    TEACHER,
    TOKEN_ENDS,
    calibrated,
    naive_layer_mix,
    paired_rows,
    teacher_batch,
)


@pytest.mark.parametrize("teacher", [TEACHER, MIXING])
def test_to_student_recovers_the_true_map(teacher: KVGeometry) -> None:
    aligner = Aligner(teacher, STUDENT, layer_map="ratio")
    assert aligner.mapper.mixes_layers == (teacher is MIXING)
    aligner, kv, read = calibrated(aligner)
    targets = aligner.targets(kv)
    for tensor, target, own in zip(TENSORS, targets, (read.k_BLHTD, read.v_BLHTD), strict=True):
        assert target.shape == (200, STUDENT.layers, STUDENT.heads, 3, STUDENT.head_dim)
        np.testing.assert_allclose(paired_rows(kv, target, 0), paired_rows(kv, own, 1), atol=2e-3)
        assert min(aligner.adapter.explained_variance(tensor)) > 0.9999
        assert torch.equal(aligner.student_view(own, tensor), own)
        assert not target.requires_grad


def test_identity_between_equal_models_returns_the_kv_unchanged() -> None:
    geometry = KVGeometry(4, 2, 4)
    aligner = Aligner(geometry, geometry, head_adapter="identity")
    assert aligner.layers_needed == (0, 1, 2, 3)
    assert not aligner.needs_student
    kv = teacher_batch(4, 4, seed=0)
    k, v = aligner.targets(kv)
    for given, target in ((kv.k_BLHMD, k), (kv.v_BLHMD, v)):
        assert given is not None
        assert torch.equal(given.nan_to_num(9.0), target.nan_to_num(9.0))


def test_to_teacher_maps_the_student_with_gradient_and_keeps_the_target() -> None:
    aligner, kv, read = calibrated(Aligner(MIXING, STUDENT, layer_map="ratio", direction="to_teacher"))
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


def test_to_teacher_starts_at_the_least_squares_solution() -> None:
    aligner, kv, read = calibrated(Aligner(TEACHER, STUDENT, direction="to_teacher"))
    x, y = paired_rows(kv, read.k_BLHTD, 1), paired_rows(kv, aligner.targets(kv)[0], 0)
    view = paired_rows(kv, aligner.student_view(read.k_BLHTD, "k"), 1)
    for layer in range(STUDENT.layers):
        augmented = np.hstack([x[:, layer], np.ones((len(x), 1))])
        best = np.linalg.lstsq(augmented, y[:, layer], rcond=None)[0]
        least = np.square(augmented @ best - y[:, layer]).sum()
        assert np.square(view[:, layer] - y[:, layer]).sum() < 1.1 * least


def test_outputs_are_nan_before_calibration() -> None:
    aligner = Aligner(TEACHER, STUDENT)
    assert all(x.isnan().all() for x in aligner.targets(teacher_batch(2, 3, seed=0)))
    assert aligner.scale("k").isnan().all()
    assert aligner.variance("v").isnan().all()


@pytest.mark.parametrize("direction", ["to_student", "to_teacher"])
def test_state_round_trips_through_safetensors(direction: str, tmp_path: Path) -> None:
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


def test_report_is_valid_json_with_settings_and_measurements() -> None:
    aligner, _, _ = calibrated(Aligner(MIXING, STUDENT, layer_map="ratio"), noise=1.0)
    report = json.loads(json.dumps(aligner.report(), allow_nan=False))
    assert report["direction"] == "to_student"
    assert report["head_adapter"] == "ridge"
    assert report["layer_map"] == {"0": [[0, 1.0]], "1": [[1, 0.5], [2, 0.5]], "2": [[3, 1.0]]}
    for tensor in TENSORS:
        assert len(report["explained_variance"][tensor]) == len(report["alpha"][tensor]) == STUDENT.layers
        assert report["scale"][tensor] == aligner.scale(tensor).tolist()
    json.dumps(Aligner(MIXING, STUDENT).report()["explained_variance"], allow_nan=False)


@pytest.mark.parametrize(
    ("teacher", "adapter", "layer_map", "refused"),
    [
        (KVGeometry(3, 3, 2), "identity", "ratio", ()),
        (KVGeometry(7, 3, 2), "identity", "last", ()),
        (KVGeometry(4, 3, 2), "identity", "ratio", ("head", "layer")),
        (KVGeometry(3, 3, 2), "ridge", "ratio", ("head", "layer")),
        (KVGeometry(4, 3, 2), "ridge", "ratio", ("head", "layer")),
        (KVGeometry(3, 3, 2), "identity", "cka", ("head", "layer")),
        (KVGeometry(3, 3, 2), "identity", "learned", ("head", "layer")),
        (KVGeometry(2, 3, 2), "identity", "uniform", ("head", "layer")),
    ],
)
def test_scope_is_refused_if_mixed_slots_would_hold_different_tokens(
    teacher: KVGeometry, adapter: str, layer_map: str, refused: tuple[str, ...]
) -> None:
    scopes: tuple[Scope, ...] = ("head", "layer", "sample")
    for scope in scopes:
        selection = Selection(selector="right", budget=4, scope=scope)
        settings: dict[str, Any] = {"layer_map": layer_map, "head_adapter": adapter}
        if scope in refused:
            with pytest.raises(FieldError, match=f"not '{scope}'") as caught:
                plan_for(STUDENT, teacher, selection=selection, codec=CodecSpec(), **settings)
            assert caught.value.field == "kv.selection.scope"
        else:
            plan_for(STUDENT, teacher, selection=selection, codec=CodecSpec(), **settings)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"direction": "sideways"}, "align.direction"),
        ({"direction": "to_teacher", "head_adapter": "identity"}, "align.head_adapter"),
        ({"direction": "to_teacher", "layer_map": "learned"}, "align.layer_map"),
        ({"head_adapter": "identity"}, "align.head_adapter"),
        ({"tokens": "guess"}, "align.tokens"),
        ({"sink_tokens": -1}, "align.sink_tokens"),
        ({"ridge_rank": 2, "direction": "to_teacher"}, "align.ridge_rank"),
        ({"ridge_rank": 2, "head_adapter": "procrustes"}, "align.ridge_rank"),
        ({"ridge_rank": 7}, "align.ridge_rank"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(FieldError) as caught:
        Aligner(TEACHER, STUDENT, **settings)
    assert caught.value.field == field


RIGHT = Selection(selector="right", budget=4)


@pytest.mark.parametrize(
    ("layer_map", "layers"),
    [
        ("ratio", (0, 2, 4)),
        ("last", (2, 3, 4)),
        ("skip", (0, 2, 4)),
        ("cka", (0, 1, 2, 3, 4)),
        ("learned", (0, 1, 2, 3, 4)),
    ],
)
def test_plan_requests_only_the_layers_that_the_map_uses(layer_map: str, layers: tuple[int, ...]) -> None:
    codec = CodecSpec(name="raw")
    plan = plan_for(STUDENT, TEACHER, selection=RIGHT, codec=codec, layer_map=layer_map)
    assert plan == KVPlan(layers=layers, selection=RIGHT, codec=codec)


def test_saved_state_is_a_copy() -> None:
    aligner, _, _ = calibrated(Aligner(TEACHER, STUDENT, head_adapter="linear"))
    saved = aligner.state_tensors()
    before = {name: tensor.clone() for name, tensor in saved.items()}
    with torch.no_grad():
        for parameter in aligner.parameters():
            parameter.add_(1.0)
    for name, tensor in saved.items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


def test_plan_refuses_identity_between_different_geometries() -> None:
    with pytest.raises(FieldError, match="'identity' needs equal heads") as caught:
        plan_for(STUDENT, KVGeometry(5, 2, 8), selection=RIGHT, codec=CodecSpec(), head_adapter="identity")
    assert caught.value.field == "align.head_adapter"


def test_cka_map_finds_the_source_layers_of_the_student() -> None:
    aligner = Aligner(TEACHER, STUDENT, layer_map="cka")
    assert aligner.needs_layer_pass
    assert aligner.needs_student
    assert aligner.report()["layer_map"] is None
    aligner, kv, read = calibrated(aligner)
    assert not aligner.needs_layer_pass
    assert aligner.report()["layer_map"] == {str(s): [[t, 1.0]] for s, t in enumerate(CKA_PATH)}
    # Batches still hold all layers, because the plan was made before the map was known.
    assert aligner.layers_needed == tuple(range(TEACHER.layers))
    for target, own in zip(aligner.targets(kv), (read.k_BLHTD, read.v_BLHTD), strict=True):
        np.testing.assert_allclose(paired_rows(kv, target, 0), paired_rows(kv, own, 1), atol=2e-3)
    for tensor in TENSORS:
        cka = np.array(aligner.report()["cka"][tensor])
        assert cka.shape == (STUDENT.layers, TEACHER.layers)
        assert tuple(cka.argmax(axis=1)) == CKA_PATH


def test_cka_map_is_restored_from_saved_state() -> None:
    aligner, kv, _ = calibrated(Aligner(TEACHER, STUDENT, layer_map="cka"))
    loaded = Aligner(TEACHER, STUDENT, layer_map="cka")
    loaded.load_state_tensors(aligner.state_tensors())
    assert not loaded.needs_layer_pass
    assert loaded.report() == aligner.report()
    for one, other in zip(aligner.targets(kv), loaded.targets(kv), strict=True):
        assert torch.equal(one.nan_to_num(9.0), other.nan_to_num(9.0))


def test_keys_and_values_have_equal_weight_in_the_cka_map() -> None:
    aligner = Aligner(TEACHER, STUDENT, layer_map="cka")
    cka_KST = torch.zeros(2, 3, 5, dtype=torch.float64)
    cka_KST[0, 1, 1], cka_KST[1, 1, 3] = 0.5, 0.6
    aligner.fit_layers(cka_KST)
    assert aligner.mapper.get_mapping()[1] == [(3, 1.0)]
    assert torch.equal(aligner.cka_KST, cka_KST)
    aligner.fit_layers(cka_KST.flip(0))
    assert aligner.mapper.get_mapping()[1] == [(3, 1.0)]


def test_targets_pass_gradient_to_trainable_teacher_side_parameters() -> None:
    aligner, kv, _ = calibrated(Aligner(TEACHER, STUDENT, layer_map="learned", head_adapter="linear"))
    target = aligner.targets(kv)[1]
    target[kv.mask_BM.nonzero()[:, 0], :, :, kv.mask_BM.nonzero()[:, 1]].square().sum().backward()
    grads = {name: parameter.grad for name, parameter in aligner.named_parameters()}
    assert sorted(name for name, grad in grads.items() if grad is None) == [
        "adapter.maps.k.bias_LG",
        "adapter.maps.k.weight_LFG",
    ]
    logits = grads["learned_map.logits_SL"]
    assert logits is not None
    assert logits.abs().sum() > 0
    assert all(grad.isfinite().all() for grad in grads.values() if grad is not None)


@pytest.mark.parametrize("adapter", ["procrustes", "pool"])
@pytest.mark.parametrize("direction", ["to_student", "to_teacher"])
def test_frozen_adapter_has_no_parameters_and_passes_the_students_gradient(adapter: str, direction: str) -> None:
    aligner, kv, read = calibrated(Aligner(TEACHER, STUDENT, direction=direction, head_adapter=adapter), noise=0.1)
    assert not list(aligner.parameters())
    own = read.k_BLHTD.clone().requires_grad_()
    view = aligner.student_view(own, "k")
    target = aligner.targets(kv)[0]
    assert view.shape[2] == target.shape[2] == (STUDENT if direction == "to_student" else TEACHER).heads
    view.square().mean().backward()
    assert own.grad is not None
    assert own.grad.abs().sum() > 0
    assert all(np.isfinite(aligner.adapter.explained_variance(tensor)).all() for tensor in TENSORS)


def test_mean_is_the_per_feature_mean_of_the_targets() -> None:
    for direction in ("to_student", "to_teacher"):
        aligner, kv, _ = calibrated(Aligner(MIXING, STUDENT, layer_map="ratio", direction=direction), noise=1.0)
        for tensor, target in zip(TENSORS, aligner.targets(kv), strict=True):
            mean_LHD = aligner.mean(tensor)
            assert mean_LHD.shape == (target.shape[1], target.shape[2], target.shape[4])
            np.testing.assert_allclose(mean_LHD.flatten(1), paired_rows(kv, target, 0).mean(axis=0), atol=1e-4)


def test_warning_names_layers_that_the_teacher_explains_poorly(caplog: pytest.LogCaptureFixture) -> None:
    poor, _, _ = calibrated(Aligner(TEACHER, STUDENT), noise=100.0)
    good, _, _ = calibrated(Aligner(TEACHER, STUDENT), noise=0.1)
    with caplog.at_level(logging.WARNING):
        good.warn_if_poor("ada")
        assert not caplog.text
        poor.warn_if_poor("ada")
    assert "ada" in caplog.text
    assert "less than 0.20 of the variance of keys in layers 0 (" in caplog.text
    assert "align.warmup_steps" in caplog.text
    assert "align.direction to_teacher" in caplog.text
