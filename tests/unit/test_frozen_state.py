"""Tests that the tensors fitted by calibration are restored to the right teacher."""

from __future__ import annotations

import pytest
import torch

from align.aligner import Aligner
from align.head_dim_adapter import KVGeometry
from student_trainer.model.distill_model import DistillModel
from tests.support.training_parts import tiny_student, train_config


def model_with(names: list[str]) -> DistillModel:
    aligners = [Aligner(KVGeometry(2, 1, 4), KVGeometry(2, 1, 4)) for _ in names]
    for number, aligner in enumerate(aligners, start=1):
        aligner.scale_LK.fill_(number)
    return DistillModel(tiny_student(), aligners, dict.fromkeys(names, 1.0), train_config())


@pytest.mark.parametrize("names", [["qwen2", "qwen2.5"], ["fused", "fused.scale_LK"], ["teacher", "other"]])
def test_each_teacher_gets_its_own_tensors_for_any_names(names: list[str]) -> None:
    saved = model_with(names)
    saved.freeze(torch.full((2, 2), 8.0), torch.full((2, 2), 9.0))
    loaded = model_with(names)
    for aligner in loaded.aligners:
        aligner.scale_LK.zero_()
    loaded.load_frozen(saved.frozen_state())
    assert [float(aligner.scale_LK[0, 0]) for aligner in loaded.aligners] == [1.0, 2.0]
    assert float(loaded.fused_scale_LK[0, 0]) == 8.0
    assert float(loaded.fused_variance_LK[0, 0]) == 9.0
