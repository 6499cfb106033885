"""Tests of calibration before the first step: alignments and target scales."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence

import pytest
import torch

from data.records import Record
from kvcore.errors import FieldError, KVDistillError, TeacherRefusedError
from student_trainer.loop import calibrate as calibrate_module
from student_trainer.loop.calibrate import calibrate
from student_trainer.model.distill_model import DistillModel, TrainBatch
from tests.support.training_parts import (
    RECORDS,
    STUDENT,
    TEACHERS,
    aligner_of,
    distill_model,
    fetch_for,
    one_rank,
    train_batch,
)


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    with one_rank():
        yield


def no_failure(failure: KVDistillError | None) -> None:
    assert failure is None


def calibrated(model: DistillModel, micro_batch: int = 8, count: int = 40, settled_within: float = 0.0) -> DistillModel:
    records = RECORDS[:count]
    calibrate(model, records, range(count), fetch_for(model, None), micro_batch, no_failure, settled_within)
    return model


def targets(model: DistillModel, batch: TrainBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The targets of the loss (K and V) and their mask."""
    if model.fusion is not None:
        return model.fused(batch)
    return *model.aligners[0].targets(batch.teachers[0]), batch.teachers[0].mask_BM


@pytest.mark.parametrize("weights", [{"ada": 1.0}, {"ada": 3.0, "ben": 1.0}])
def test_scale_is_measured_on_the_targets_of_the_loss(weights: dict[str, float]) -> None:
    model = calibrated(distill_model(weights))
    batch = train_batch(model, RECORDS[:40], None)
    k_BLHMD, v_BLHMD, mask_BM = targets(model, batch)
    for column, x_BLHMD in enumerate((k_BLHMD, v_BLHMD)):
        for layer in range(x_BLHMD.shape[1]):
            rows = [x_BLHMD[b, layer, :, m].flatten() for b, m in mask_BM.nonzero().tolist()]
            x_NF = torch.stack(rows).double()
            # The moments of a single teacher cover only the tokens that its map was fitted on, which are nearly all.
            tolerance = 1e-5 if len(weights) > 1 else 0.05
            deviation = float((x_NF - x_NF.mean()).square().mean().sqrt())
            variance = float((x_NF - x_NF.mean(dim=0)).square().mean())
            assert float(model.fused_scale_LK[layer, column]) == pytest.approx(deviation, rel=tolerance)
            assert float(model.fused_variance_LK[layer, column]) == pytest.approx(variance, rel=tolerance)


def test_without_fusion_the_first_teachers_scale_is_kept() -> None:
    model = calibrated(distill_model({"ada": 3.0, "ben": 1.0}, direction="to_teacher"))
    assert model.fused_scale_LK.equal(model.aligners[0].scale_LK)
    assert model.fused_variance_LK.equal(model.aligners[0].variance_LK)


def test_fit_does_not_depend_on_batch_size() -> None:
    one, other = (calibrated(distill_model({"ada": 1.0, "ben": 1.0}), micro_batch) for micro_batch in (40, 7))
    assert_same_frozen_state(one, other)


def test_held_out_samples_are_chosen_by_global_index() -> None:
    model = distill_model({"ada": 1.0})
    calibrate(model, RECORDS[:5], [4, 9, 1, 2, 14], fetch_for(model, None), 2, no_failure)
    by_number = {"fit": 0, "held_out": 0}
    for record, number in zip(RECORDS[:5], [4, 9, 1, 2, 14], strict=True):
        batch = train_batch(model, [record], None)
        text = [end for end in batch.tokens.text_byte_ends_BT[0].tolist() if end >= 0]
        own = set(text[1:])
        theirs = set(batch.teachers[0].byte_ends_BLHM.flatten().tolist()) - {-1}
        by_number["held_out" if number % 5 == 4 else "fit"] += len(own & theirs)
    assert model.report()["ada"]["rows"] == by_number


def test_calibration_computes_no_gradient_and_does_not_change_the_student() -> None:
    model = distill_model({"ada": 1.0})
    before = {name: tensor.clone() for name, tensor in model.student.state_dict().items()}
    calibrated(model)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(tensor.equal(before[name]) for name, tensor in model.student.state_dict().items())


def test_teacher_failure_is_shared_before_the_next_collective() -> None:
    model = distill_model({"ada": 1.0})
    lost = TeacherRefusedError("ada", "no")
    shared: list[KVDistillError | None] = []

    def fetch(_batches: Iterable[Sequence[Record]]) -> Iterator[TrainBatch]:
        raise lost

    def fail_together(failure: KVDistillError | None) -> None:
        shared.append(failure)
        raise lost

    with pytest.raises(TeacherRefusedError):
        calibrate(model, RECORDS[:8], range(8), fetch, 4, fail_together)
    assert shared == [lost]
    assert not model.frozen_state()


@pytest.fixture
def _looking_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at the explained variance after every 8 samples."""
    monkeypatch.setattr(calibrate_module, "FEWEST_BETWEEN", 8)


def assert_same_frozen_state(one: DistillModel, other: DistillModel) -> None:
    """The control is not compared: its pairs depend on the batches."""
    assert one.frozen_state().keys() == other.frozen_state().keys()
    for name, tensor in one.frozen_state().items():
        if not name.endswith("/shuffled_LK"):
            torch.testing.assert_close(
                other.frozen_state()[name], tensor, rtol=1e-3, atol=1e-4, equal_nan=True, msg=name
            )


@pytest.mark.usefixtures("_looking_often")
@pytest.mark.parametrize("head_adapter", ["ridge", "identity"])
def test_calibration_stops_when_nothing_changes_any_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, head_adapter: str
) -> None:
    """Every look sees the same samples again, so that the second one finds no change."""
    again = RECORDS[:8] * 5

    # A teacher with the student's heads.
    monkeypatch.setitem(TEACHERS, "cay", STUDENT)

    def model() -> DistillModel:
        align = {"head_adapter": head_adapter}
        return distill_model({"ada": 1.0, "ben": 1.0} if head_adapter == "ridge" else {"cay": 1.0}, align=align)

    settled, whole = model(), model()
    read: list[str] = []

    def fetch(batches: Iterable[Sequence[Record]]) -> Iterator[TrainBatch]:
        for chosen in batches:
            read.extend(record.id for record in chosen)
            yield train_batch(settled, chosen, None)

    with caplog.at_level(logging.INFO):
        calibrate(settled, again, [i % 8 for i in range(40)], fetch, 4, no_failure, settled_within=1e-9)
    assert "alignment settled after 16 of 40 samples" in caplog.messages
    assert len(read) == 16 * (2 if settled.fusion is not None else 1), "the scale is of the same samples"
    calibrate(whole, again[:16], [i % 8 for i in range(16)], fetch_for(whole, None), 4, no_failure)
    assert_same_frozen_state(settled, whole)


@pytest.mark.usefixtures("_looking_often")
def test_calibration_reads_every_sample_while_the_explained_variance_changes(caplog: pytest.LogCaptureFixture) -> None:
    once = calibrated(distill_model({"ada": 1.0, "ben": 1.0}), micro_batch=40)
    with caplog.at_level(logging.INFO):
        often = calibrated(distill_model({"ada": 1.0, "ben": 1.0}), settled_within=1e-9)
    assert "settled" not in caplog.text
    assert_same_frozen_state(once, often)


def test_few_samples_are_looked_at_once() -> None:
    together: list[None] = []

    def fail_together(failure: KVDistillError | None) -> None:
        together.append(no_failure(failure))

    model = distill_model({"ada": 1.0})
    calibrate(model, RECORDS[:40], range(40), fetch_for(model, None), 8, fail_together, settled_within=1e9)
    assert len(together) == 1
    assert model.report()["ada"]["rows"] == calibrated(distill_model({"ada": 1.0})).report()["ada"]["rows"]


@pytest.mark.parametrize("teachers", [{"ada": 1.0}, {"ada": 1.0, "ben": 1.0}])
@pytest.mark.parametrize("layer_map", ["ratio", "learned", "cka"])
def test_layer_map_and_fusion_each_add_one_pass_over_the_samples(layer_map: str, teachers: dict[str, float]) -> None:
    fuse = {"kind": "learnable"} if layer_map == "learned" else {}
    model = distill_model(teachers, align={"layer_map": layer_map}, fuse=fuse)
    passes = 1 + (layer_map == "cka") + (model.fusion is not None)
    read: list[str] = []
    together: list[None] = []

    def fetch(batches: Iterable[Sequence[Record]]) -> Iterator[TrainBatch]:
        for chosen in batches:
            read.extend(record.id for record in chosen)
            yield train_batch(model, chosen, None)

    def fail_together(failure: KVDistillError | None) -> None:
        assert failure is None
        together.append(failure)

    calibrate(model, RECORDS[:40], range(40), fetch, 16, fail_together)
    assert read == [record.id for record in RECORDS[:40]] * passes
    assert len(together) == passes
    assert not any(aligner.needs_layer_pass for aligner in model.aligners)


def test_every_teacher_is_calibrated_on_its_own_kv() -> None:
    """Only the layer map of the second teacher needs a pass of its own."""
    both = distill_model({"ada": 1.0, "ben": 1.0})
    both.aligners = (aligner_of("ada"), aligner_of("ben", layer_map="cka"))
    alone = distill_model({"ben": 1.0}, align={"layer_map": "cka"})
    for model in (both, alone):
        calibrated(model)
    assert both.aligners[1].report() == alone.aligners[0].report()
    assert both.report()["ada"]["layer_strategy"] == "ratio"


def test_failure_in_second_pass_is_shared() -> None:
    model = distill_model({"ada": 1.0}, align={"layer_map": "cka"})
    lost = TeacherRefusedError("ada", "no")
    shared: list[KVDistillError | None] = []
    read: list[int] = []

    def fetch(batches: Iterable[Sequence[Record]]) -> Iterator[TrainBatch]:
        for chosen in batches:
            read.append(len(chosen))
            if len(read) > 5:
                raise lost
            yield train_batch(model, chosen, None)

    def fail_together(failure: KVDistillError | None) -> None:
        shared.append(failure)
        if failure is not None:
            raise failure

    with pytest.raises(TeacherRefusedError):
        calibrate(model, RECORDS[:40], range(40), fetch, 8, fail_together)
    assert shared == [None, lost]
    assert not model.frozen_state()


def test_poor_map_warning_names_the_teacher(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        calibrated(distill_model({"ada": 1.0}), count=10)
    assert "ada: the adapter explains less than 0.20" in caplog.text


def test_report_has_a_shuffled_control_for_every_fit() -> None:
    model = calibrated(distill_model({"ada": 1.0, "ben": 1.0}))
    for report in model.report().values():
        for tensor in ("k", "v"):
            true, control = report["explained_variance"][tensor], report["explained_variance_shuffled"][tensor]
            assert len(true) == len(control) == 2
            assert None not in control


def test_too_few_samples_raise_field_error() -> None:
    with pytest.raises(FieldError, match=r"align\.calibration_samples"):
        calibrated(distill_model({"ada": 1.0}), count=3)
