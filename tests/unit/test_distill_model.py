"""Tests of how the distillation model combines its losses. The loss functions have their own tests."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.whole_readings import answer_reading, naive_cross_entropy
from kvcore.types import TENSORS, BatchKV, Tensor
from student_trainer.config import LossConfig
from student_trainer.loop.calibrate import calibrate
from student_trainer.model.distill_model import DistillModel, TrainBatch
from student_trainer.model.losses import error_by_layer_and_head, kv_distance
from tests.support.training_parts import (
    LATENTS,
    RECORDS,
    TEACHERS,
    distill_model,
    fetch_for,
    one_rank,
    text_logits,
    train_batch,
)

BATCH = RECORDS[40:44]
WEIGHTS = {"ada": 3.0, "ben": 1.0}
LOSS = LossConfig(kv_weight=5.0, reasoning_ce_weight=0.5, kv_loss="mse")


def model_of(
    weights: dict[str, float], *, mode: str = "latent", direction: str = "to_student", loss: LossConfig = LOSS
) -> DistillModel:
    """A model in training mode, calibrated on records that the tests do not use."""
    model = distill_model(weights, mode=mode, direction=direction, loss=loss)
    with one_rank():
        calibrate(model, RECORDS[:40], range(40), fetch_for(model, None), 40, lambda _: None)
    return model.train()


def losses_of(model: DistillModel, batch: TrainBatch) -> dict[str, float]:
    return {name: float(value.detach()) for name, value in model(batch).items() if value.dim() == 0}


def without(kv: BatchKV, row: int, fill: float = 0.0) -> BatchKV:
    """The K/V of a teacher without the K/V of sample `row`."""
    left = replace(kv.map(torch.clone), mask_BM=kv.mask_BM.clone())
    left.k_BLHMD[row], left.v_BLHMD[row], left.mask_BM[row] = fill, fill, False
    return left


def latent_kv(model: DistillModel, batch: TrainBatch) -> tuple[Tensor, Tensor, Tensor]:
    tokens = batch.tokens
    answers = (tokens.answer_ids_BA, tokens.answer_mask_BA)
    hidden_BAE, k_BLHMD, v_BLHMD = answer_reading(model.student, tokens.prompt_ids_BP, tokens.prompt_mask_BP, *answers)
    return model.student.logits(hidden_BAE), k_BLHMD, v_BLHMD


def test_latent_loss_is_the_weighted_sum_of_its_terms() -> None:
    model = model_of({"ada": 1.0})
    batch = train_batch(model, BATCH)
    tokens, (kv,), (aligner,) = batch.tokens, batch.teachers, model.aligners
    logits_BAV, k_BLHMD, v_BLHMD = latent_kv(model, batch)
    logits_BTV = text_logits(model.student, tokens)
    answer = naive_cross_entropy(logits_BAV, tokens.answer_ids_BA, tokens.answer_mask_BA)
    reasoning = naive_cross_entropy(logits_BTV, tokens.text_ids_BT[:, 1:], tokens.text_target_BT[:, 1:])
    sides = list(zip((k_BLHMD, v_BLHMD), aligner.targets(kv), TENSORS, strict=True))
    objective = sum(float(kv_distance(a, b, aligner.scale(t), kv.mask_BM, "mse").detach()) for a, b, t in sides) / 2
    error = sum(float(error_by_layer_and_head(a, b, aligner.variance(t), kv.mask_BM).mean()) for a, b, t in sides) / 2
    expected = {
        "answer_ce": float(answer.detach()),
        "reasoning_ce": float(reasoning.detach()),
        "ce_loss": float((answer + 0.5 * reasoning).detach()),
        "kv_objective": objective,
        "kv_loss": error,
        "loss": float((answer + 0.5 * reasoning).detach()) + 5.0 * objective,
    }
    assert losses_of(model, batch) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("direction", ["to_student", "to_teacher"])
@pytest.mark.parametrize("kv_scale", ["layer", "none"])
def test_kv_are_divided_by_the_deviation_of_each_layer_or_by_nothing(kv_scale: str, direction: str) -> None:
    loss = LossConfig.model_validate({"kv_weight": 5.0, "kv_loss": "mse", "kv_scale": kv_scale})
    model = model_of({"ada": 1.0}, direction=direction, loss=loss)
    batch = train_batch(model, BATCH)
    (kv,), (aligner,) = batch.teachers, model.aligners
    _, *own = latent_kv(model, batch)
    found = []
    for tensor, own_BLHMD, target_BLHMD in zip(TENSORS, own, aligner.targets(kv), strict=True):
        view_BLHMD = aligner.student_view(own_BLHMD, tensor).detach().double()
        for layer, deviation in enumerate(aligner.scale(tensor).tolist()):
            assert abs(deviation - 1) > 0.01, "a deviation of 1 would hide the difference"
            divisor = deviation if kv_scale == "layer" else 1.0
            difference_BHMD = (view_BLHMD[:, layer] - target_BLHMD[:, layer].double()) / divisor
            found.append(float(difference_BHMD.square().mean()))
    losses = losses_of(model, batch)
    assert losses["kv_objective"] == pytest.approx(sum(found) / len(found), rel=1e-5)
    assert losses["loss"] == pytest.approx(losses["ce_loss"] + 5.0 * losses["kv_objective"], rel=1e-5)


def test_reasoning_has_no_loss_in_validation_or_with_weight_zero() -> None:
    model = model_of({"ada": 1.0}).eval()
    assert "reasoning_ce" not in losses_of(model, train_batch(model, BATCH))
    unscored = model_of({"ada": 1.0}, loss=LossConfig(reasoning_ce_weight=0.0))
    assert "reasoning_ce" not in losses_of(unscored, train_batch(unscored, BATCH))


def test_loss_without_teachers_is_the_cross_entropy() -> None:
    for mode, names in (
        ("latent", {"answer_ce", "reasoning_ce", "ce_loss", "loss"}),
        ("token", {"answer_ce", "ce_loss", "loss"}),
    ):
        model = distill_model({}, mode=mode).train()
        losses = losses_of(model, train_batch(model, BATCH))
        assert losses.keys() == names
        assert losses["loss"] == losses["ce_loss"]


def test_token_mode_reports_the_cross_entropy_of_the_answer_alone() -> None:
    model = distill_model({}, mode="token").train()
    tokens = train_batch(model, BATCH).tokens
    logits_BTV = text_logits(model.student, tokens)
    answers = [len((record.prompt + record.reasoning).encode()) for record in BATCH]
    # An answer's tokens end after the reasoning; the end of sequence has no end in the text.
    ends_BT, inside_BT = tokens.text_byte_ends_BT[:, 1:], tokens.text_mask_BT[:, 1:]
    answer_BT = inside_BT & ((ends_BT > torch.tensor(answers)[:, None]) | (ends_BT < 0))
    expected = naive_cross_entropy(logits_BTV, tokens.text_ids_BT[:, 1:], answer_BT)
    assert losses_of(model, train_batch(model, BATCH))["answer_ce"] == pytest.approx(float(expected.detach()), rel=1e-5)


def test_to_student_fuses_teachers_with_normalised_weights() -> None:
    model = model_of(WEIGHTS)
    batch = train_batch(model, BATCH)
    (ada_k, ada_v), (ben_k, ben_v) = (
        aligner.targets(kv) for aligner, kv in zip(model.aligners, batch.teachers, strict=True)
    )
    k_BLHMD, v_BLHMD, mask_BM = model.fused(batch)
    torch.testing.assert_close(k_BLHMD, 0.75 * ada_k + 0.25 * ben_k)
    assert (ada_k - ben_k).abs().mean() > 0.1
    torch.testing.assert_close(v_BLHMD, 0.75 * ada_v + 0.25 * ben_v)
    _, own_k, own_v = latent_kv(model, batch)
    parts = [
        kv_distance(own, wanted, model.fused_scale_LK[:, column].float(), mask_BM, "mse")
        for column, (own, wanted) in enumerate(((own_k, k_BLHMD), (own_v, v_BLHMD)))
    ]
    assert losses_of(model, batch)["kv_objective"] == pytest.approx(float(torch.stack(parts).mean().detach()), rel=1e-5)
    assert model.weights == {"ada": 0.75, "ben": 0.25}


def test_missing_kv_of_one_teacher_leaves_the_other_as_target() -> None:
    model = model_of(WEIGHTS)
    batch = train_batch(model, BATCH)
    ada, ben = batch.teachers
    k_BLHMD, _, mask_BM = model.fused(TrainBatch(batch.tokens, (without(ada, 1, fill=1e6), ben)))
    assert mask_BM.equal(ben.mask_BM)
    torch.testing.assert_close(k_BLHMD[1], model.aligners[1].targets(ben)[0][1])
    torch.testing.assert_close(k_BLHMD[0], model.fused(batch)[0][0])


def test_to_teacher_averages_losses_with_teacher_weights() -> None:
    both = model_of(WEIGHTS, direction="to_teacher")
    batch = train_batch(both, BATCH)
    losses = losses_of(both, batch)
    alone: list[dict[str, float]] = []
    for name, kv in zip(WEIGHTS, batch.teachers, strict=True):
        single = model_of({name: 1.0}, direction="to_teacher")
        alone.append(losses_of(single, TrainBatch(batch.tokens, (kv,))))
    for name in ("kv_objective", "kv_loss"):
        assert losses[name] == pytest.approx(0.75 * alone[0][name] + 0.25 * alone[1][name], rel=1e-4)
    assert alone[0]["kv_objective"] != pytest.approx(alone[1]["kv_objective"], rel=1e-2)


@pytest.mark.parametrize("direction", ["to_student", "to_teacher"])
def test_only_to_teacher_trains_regressors(direction: str) -> None:
    model = model_of(WEIGHTS, direction=direction)
    model(train_batch(model, BATCH))["kv_objective"].backward()
    trained = {name: p.grad for name, p in model.named_parameters() if name.startswith("trained_aligners.")}
    assert bool(trained) == (direction == "to_teacher")
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in trained.values())
    frozen = [p for aligner in model.aligners for p in aligner.parameters() if p.requires_grad]
    assert len(frozen) == len(trained)


@pytest.mark.parametrize("mode", ["latent", "token"])
@pytest.mark.parametrize("weights", [{"ada": 1.0}, WEIGHTS])
def test_sample_without_kv_has_cross_entropy_but_no_kv_loss(mode: str, weights: dict[str, float]) -> None:
    model = model_of(weights, mode=mode)
    batch = train_batch(model, BATCH, LATENTS if mode == "latent" else None)
    missing = replace(batch, teachers=tuple(without(kv, 2) for kv in batch.teachers))
    others = [row for row in range(4) if row != 2]
    reduced = train_batch(model, [BATCH[row] for row in others], LATENTS if mode == "latent" else None)
    with_all, with_three, three = losses_of(model, batch), losses_of(model, missing), losses_of(model, reduced)
    assert with_three["ce_loss"] == with_all["ce_loss"]
    for name in ("kv_objective", "kv_loss"):
        assert with_three[name] == pytest.approx(three[name], rel=1e-4)
        assert with_three[name] != pytest.approx(with_all[name], rel=1e-4)
    nothing = replace(batch, teachers=tuple(kv for kv in batch.teachers))
    for row in range(4):
        nothing = replace(nothing, teachers=tuple(without(kv, row) for kv in nothing.teachers))
    assert losses_of(model, nothing)["kv_objective"] == 0
    assert losses_of(model, nothing)["loss"] == with_all["ce_loss"]


def test_token_mode_compares_tokens_that_end_at_the_same_byte() -> None:
    model = model_of({"ada": 1.0}, mode="token")
    batch = train_batch(model, BATCH, None)
    # The teacher has other tokens: only every third byte end of the student is also an end of the teacher.
    (kv,) = batch.teachers
    kept = torch.arange(kv.mask_BM.shape[1]) % 3 == 1
    sparse = replace(
        kv.map(lambda x: x[:, :, :, kept]), mask_BM=kv.mask_BM[:, kept], byte_ends_BLHM=kv.byte_ends_BLHM[..., kept]
    )
    (aligner,) = model.aligners
    tokens = batch.tokens
    text = model.student.read_text(tokens.text_ids_BT, tokens.text_mask_BT)
    own = (text.k_BLHTD, text.v_BLHTD)
    errors: list[float] = []
    for own_x, target_x, tensor in zip(own, aligner.targets(sparse), TENSORS, strict=True):
        samples: list[float] = []
        for b in range(len(BATCH)):
            ends = [
                int(end) for end, there in zip(sparse.byte_ends_BLHM[b, 0, 0], sparse.mask_BM[b], strict=True) if there
            ]
            pairs = [(ends.index(int(end)), t) for t, end in enumerate(tokens.text_byte_ends_BT[b]) if int(end) in ends]
            assert 2 <= len(pairs) < int(tokens.text_mask_BT[b].sum())
            differences = [
                ((own_x[b, :, :, t] - target_x[b, :, :, m]) / aligner.scale(tensor)[:, None, None]).square().mean()
                for m, t in pairs
            ]
            samples.append(float(torch.stack(differences).mean().detach()))
        errors.append(sum(samples) / len(samples))
    losses = losses_of(model, TrainBatch(tokens, (sparse,)))
    assert losses["kv_objective"] == pytest.approx(sum(errors) / 2, rel=1e-4)
    assert losses["loss"] == pytest.approx(losses["ce_loss"] + 5.0 * losses["kv_objective"], rel=1e-5)


@pytest.mark.parametrize("direction", ["to_student", "to_teacher"])
def test_calibration_is_restored_from_its_tensors(direction: str) -> None:
    model = model_of(WEIGHTS, direction=direction)
    other = distill_model(WEIGHTS, direction=direction, loss=LOSS).train()
    other.load_frozen(model.frozen_state())
    batch = train_batch(model, BATCH)
    assert losses_of(other, batch) == losses_of(model, batch)
    assert other.frozen_state().keys() == model.frozen_state().keys()
    assert other.report() == model.report()
    assert other.report().keys() == TEACHERS.keys()


def test_frozen_state_does_not_change_while_regressors_train() -> None:
    model = model_of({"ada": 1.0}, direction="to_teacher")
    before = {name: tensor.clone() for name, tensor in model.frozen_state().items()}
    with torch.no_grad():
        for parameter in model.trained_aligners.parameters():
            parameter.add_(1.0)
    assert all(tensor.nan_to_num().equal(before[name].nan_to_num()) for name, tensor in model.frozen_state().items())
