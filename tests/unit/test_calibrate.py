"""Alignments and the scale of the targets are fitted before the first step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch

from data.records import Record
from kvcore.errors import FieldError, KVDistillError, TeacherRefusedError
from student_trainer.calibrate import calibrate
from student_trainer.model import DistillModel, TrainBatch
from tests.support.training_parts import RECORDS, distill_model, one_rank, train_batch

RecordsRead = list[int]


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    with one_rank():
        yield


def no_failure(failure: KVDistillError | None) -> None:
    assert failure is None


def calibrated(model: DistillModel, micro_batch: int = 8, count: int = 40) -> DistillModel:
    records = RECORDS[:count]
    calibrate(model, records, range(count), lambda chosen: train_batch(model, chosen, None), micro_batch, no_failure)
    return model


@pytest.mark.parametrize("weights", [{"ada": 1.0}, {"ada": 3.0, "ben": 1.0}])
def test_the_targets_scale_is_that_of_what_the_loss_compares_with(weights: dict[str, float]) -> None:
    model = calibrated(distill_model(weights))
    batch = train_batch(model, RECORDS[:40], None)
    k_BLHMD, v_BLHMD, mask_BM = model.fused(batch.teachers)
    for column, x_BLHMD in enumerate((k_BLHMD, v_BLHMD)):
        for layer in range(x_BLHMD.shape[1]):
            rows = [x_BLHMD[b, layer, :, m].flatten() for b, m in mask_BM.nonzero().tolist()]
            x_NF = torch.stack(rows).double()
            # One teacher's moments are those of the tokens that its map was fitted on: all but a few.
            tolerance = 1e-5 if len(weights) > 1 else 0.05
            deviation = float((x_NF - x_NF.mean()).square().mean().sqrt())
            variance = float((x_NF - x_NF.mean(dim=0)).square().mean())
            assert float(model.fused_scale_LK[layer, column]) == pytest.approx(deviation, rel=tolerance)
            assert float(model.fused_variance_LK[layer, column]) == pytest.approx(variance, rel=tolerance)


def test_the_first_teachers_scale_stands_where_nothing_is_fused() -> None:
    model = calibrated(distill_model({"ada": 3.0, "ben": 1.0}, direction="to_teacher"))
    assert model.fused_scale_LK.equal(model.aligners[0].scale_LK)
    assert model.fused_variance_LK.equal(model.aligners[0].variance_LK)


def test_the_fit_does_not_depend_on_how_samples_are_batched() -> None:
    one, other = (calibrated(distill_model({"ada": 1.0, "ben": 1.0}), micro_batch) for micro_batch in (40, 7))
    assert one.frozen_state().keys() == other.frozen_state().keys()
    for name, tensor in one.frozen_state().items():
        torch.testing.assert_close(other.frozen_state()[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_the_samples_numbers_among_all_ranks_decide_what_is_held_out() -> None:
    model = distill_model({"ada": 1.0})
    calibrate(model, RECORDS[:5], [4, 9, 1, 2, 14], lambda chosen: train_batch(model, chosen, None), 2, no_failure)
    by_number = {"fit": 0, "held_out": 0}
    for record, number in zip(RECORDS[:5], [4, 9, 1, 2, 14], strict=True):
        batch = train_batch(model, [record], None)
        own = set(batch.tokens.text_byte_ends_BT[0].tolist()) - {-1}
        theirs = set(batch.teachers[0].byte_ends_BLHM.flatten().tolist()) - {-1}
        by_number["held_out" if number % 5 == 4 else "fit"] += len(own & theirs)
    assert model.report()["ada"]["rows"] == by_number


def test_calibration_takes_no_gradient_and_leaves_the_student_as_it_was() -> None:
    model = distill_model({"ada": 1.0})
    before = {name: tensor.clone() for name, tensor in model.student.state_dict().items()}
    calibrated(model)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(tensor.equal(before[name]) for name, tensor in model.student.state_dict().items())


def test_a_teachers_failure_is_shared_before_any_rank_waits_for_another() -> None:
    model = distill_model({"ada": 1.0})
    lost = TeacherRefusedError("ada", "no")
    shared: list[KVDistillError | None] = []

    def batcher(_records: Sequence[Record]) -> TrainBatch:
        raise lost

    def fail_together(failure: KVDistillError | None) -> None:
        shared.append(failure)
        raise lost

    with pytest.raises(TeacherRefusedError):
        calibrate(model, RECORDS[:8], range(8), batcher, 4, fail_together)
    assert shared == [lost]
    assert not model.frozen_state()


def test_too_few_samples_are_refused_by_the_settings_name() -> None:
    with pytest.raises(FieldError, match=r"align\.calibration_samples"):
        calibrated(distill_model({"ada": 1.0}), count=3)
