"""The map that a teacher applies gives the targets that the trainer computes, and they are measured in the same way."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from align.aligner import Aligner
from align.head_dim_adapter import HeadDimAdapter, KVGeometry
from align.student_map import can_map_at_teacher, check_student_map, student_map
from kvcore.errors import FieldError
from kvcore.tensors.kv_map import KVMap
from kvcore.types import TENSORS, BatchKV, Tensor, TensorKind
from tests.support.alignment_parts import STUDENT, TEACHER, calibrate_on, calibrated
from tests.support.kv_maps import naive_mapped

# What a teacher that applies its map looks like.
SENT = KVGeometry(TEACHER.layers, STUDENT.heads, STUDENT.head_dim)


def sent(kv_map: KVMap, kv: BatchKV) -> BatchKV:
    """The K/V as a teacher sends them: mapped layer by layer."""

    def mapped(x_BLHMD: Tensor, kind: TensorKind) -> Tensor:
        layers = [kv_map.apply(x_BLHMD[:, place], layer, kind) for place, layer in enumerate(kv_map.layers)]
        return torch.stack(layers, dim=1)

    return dataclasses.replace(kv, k_BLHMD=mapped(kv.k_BLHMD, "k"), v_BLHMD=mapped(kv.v_BLHMD, "v"))


@pytest.mark.parametrize("layer_map", ["uniform", "last", "skip", "ratio"])
@pytest.mark.parametrize("adapter", ["ridge", "procrustes", "pool"])
def test_k_and_v_mapped_by_the_teacher_are_the_trainers_targets_and_those_of_a_naive_map(
    adapter: str, layer_map: str
) -> None:
    aligner = Aligner(TEACHER, STUDENT, layer_map=layer_map, head_adapter=adapter)
    trainer, kv, _ = calibrated(aligner, samples=40, noise=0.5)
    kv_map = student_map(trainer)
    assert kv_map.layers == trainer.layers_needed
    assert (kv_map.named.heads, kv_map.named.head_dim) == (STUDENT.heads, STUDENT.head_dim)
    mapped = Aligner(SENT, STUDENT, layer_map=layer_map, head_adapter="mapped")
    assert mapped.layers_needed == trainer.layers_needed
    both = zip(TENSORS, mapped.targets(sent(kv_map, kv)), trainer.targets(kv), strict=True)
    for kind, found_BLHMD, expected_BLHMD in both:
        # Empty slots hold NaN on both sides.
        torch.testing.assert_close(found_BLHMD, expected_BLHMD, atol=1e-5, rtol=1e-5, equal_nan=True)
        source_BLHMD = kv.k_BLHMD if kind == "k" else kv.v_BLHMD
        # By loops over the alignment's own weights: the layer of each student layer, then its affine map.
        for student_layer, [(layer, _)] in trainer.mapper.get_mapping().items():
            affine = trainer.adapter.layer_map(kind, student_layer)
            assert affine is not None
            reference = KVMap(
                {
                    "layers": torch.tensor([layer], dtype=torch.int32),
                    f"{kind}.centre": torch.zeros(1, TEACHER.features),
                    f"{kind}.weight": affine[0].view(1, TEACHER.features, STUDENT.heads, STUDENT.head_dim),
                    f"{kind}.bias": affine[1].view(1, STUDENT.heads, STUDENT.head_dim),
                }
            )
            x_HMD = source_BLHMD[1, trainer.layers_needed.index(layer)]
            naive_HMD = naive_mapped(reference, x_HMD, layer, kind)
            torch.testing.assert_close(found_BLHMD[1, student_layer].double(), naive_HMD, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("adapter", ["ridge", "procrustes"])
def test_mapped_kv_are_measured_like_those_that_the_trainer_maps(adapter: str, tmp_path: Path) -> None:
    trainer, kv, read = calibrated(Aligner(TEACHER, STUDENT, head_adapter=adapter), noise=1.0)
    mapped = Aligner(SENT, STUDENT, head_adapter="mapped")
    calibrate_on(mapped, sent(student_map(trainer), kv), read)
    for kind in TENSORS:
        torch.testing.assert_close(mapped.scale(kind), trainer.scale(kind), rtol=1e-5, atol=0)
        torch.testing.assert_close(mapped.variance(kind), trainer.variance(kind), rtol=1e-5, atol=0)
        torch.testing.assert_close(mapped.mean(kind), trainer.mean(kind), rtol=1e-5, atol=1e-5)
        explained = mapped.adapter.explained_variance(kind)
        assert explained == pytest.approx(trainer.adapter.explained_variance(kind), abs=1e-5)
        assert 0.2 < min(explained) < 0.999
    found, expected = mapped.report(), trainer.report()
    for key in ("rows", "coverage", "layer_map", "student"):
        assert found[key] == expected[key]
    assert found["head_adapter"] == "mapped"
    # What is measured survives a checkpoint.
    save_file(mapped.state_tensors(), tmp_path / "mapped.safetensors")
    loaded = Aligner(SENT, STUDENT, head_adapter="mapped")
    loaded.load_state_tensors(load_file(tmp_path / "mapped.safetensors"))
    assert loaded.report() == found


def test_a_map_that_does_not_suit_its_student_is_seen_in_the_explained_variance() -> None:
    trainer, kv, read = calibrated(Aligner(TEACHER, STUDENT), noise=0.1)
    mapped = Aligner(SENT, STUDENT, head_adapter="mapped")
    other = dataclasses.replace(read, k_BLHTD=read.k_BLHTD.flip(-1), v_BLHTD=read.v_BLHTD.flip(-1))
    calibrate_on(mapped, sent(student_map(trainer), kv), other)
    assert max(mapped.adapter.explained_variance("k") + mapped.adapter.explained_variance("v")) < 0.2
    assert min(trainer.adapter.explained_variance("k") + trainer.adapter.explained_variance("v")) > 0.9


def test_equal_alignments_give_equal_maps() -> None:
    one, other = (student_map(calibrated(Aligner(TEACHER, STUDENT), noise=1.0)[0]) for _ in range(2))
    assert one.named == other.named


def test_layers_that_are_mixed_shared_or_not_known_yet_are_refused() -> None:
    student = KVGeometry(4, 1, 8)
    check_student_map(KVGeometry(9, 2, 3), student, "uniform")
    # Three layers for four of the student: `uniform` shares one, the others mix them.
    for layer_map in ("uniform", "last", "ratio"):
        problem = f"^align.map_at: .*'{layer_map}' mixes or shares this teacher's 3 layers for 4 of the student"
        with pytest.raises(FieldError, match=problem):
            check_student_map(KVGeometry(3, 2, 3), student, layer_map)
    for layer_map in ("cka", "learned"):
        assert not can_map_at_teacher(KVGeometry(9, 2, 3), student, layer_map, "ridge")
    for adapter in ("linear", "identity"):
        assert not can_map_at_teacher(KVGeometry(9, 2, 3), student, "uniform", adapter)
    assert can_map_at_teacher(KVGeometry(9, 2, 3), student, "uniform", "pool")


def test_mapped_kv_of_another_shape_are_refused() -> None:
    with pytest.raises(FieldError, match=r"^align.head_adapter: 'mapped' needs equal heads and head dims; got 2 x 4"):
        HeadDimAdapter(2, TEACHER, STUDENT, "mapped")
    with pytest.raises(FieldError, match="'to_teacher' trains the map, and 'mapped' has none"):
        Aligner(SENT, STUDENT, direction="to_teacher", head_adapter="mapped")
