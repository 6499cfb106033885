"""Routing inside the model: who gets weight, and what may and may not learn from the router loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from align.head_dim_adapter import TENSORS
from kvcore.types import BatchKV, Tensor
from student_trainer.calibrate import calibrate
from student_trainer.config import LossConfig
from student_trainer.losses import cross_entropy
from student_trainer.model import DistillModel, TrainBatch
from student_trainer.router_loss import RouterLoss
from tests.support.training_parts import LATENTS, RECORDS, distill_model, one_rank, train_batch

BATCH = RECORDS[40:44]
BOTH = {"ada": 1.0, "ben": 1.0}
KV_ALONE = LossConfig(reasoning_ce_weight=0.0, kv_weight=1.0)


def model_of(mode: str = "latent", loss: LossConfig = KV_ALONE, **sections: dict[str, Any]) -> DistillModel:
    """Two teachers, calibrated on records that no test reads."""
    torch.manual_seed(0)
    model = distill_model(BOTH, mode=mode, loss=loss, **sections)
    with one_rank():
        calibrate(model, RECORDS[:40], range(40), lambda chosen: train_batch(model, chosen, None), 40, lambda _: None)
    return model.train()


def noisy(kv: BatchKV) -> BatchKV:
    """The same cache under noise that no map can see through."""
    assert kv.k_BLHMD is not None
    assert kv.v_BLHMD is not None
    generator = torch.Generator().manual_seed(1)
    k, v = (x + 20 * torch.randn(x.shape, generator=generator) for x in (kv.k_BLHMD, kv.v_BLHMD))
    return replace(kv, k_BLHMD=k, v_BLHMD=v)


def gradients(model: DistillModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("mode", ["latent", "token"])
@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
def test_similarity_trusts_the_teacher_that_says_what_the_student_reads(mode: str, metric: str) -> None:
    model = model_of(mode, fuse={"kind": "similarity", "metric": metric, "temperature": 0.2, "temperature_floor": 0.1})
    batch = train_batch(model, BATCH, LATENTS if mode == "latent" else None)
    weights = {}
    for spoilt in range(2):
        teachers = tuple(noisy(kv) if index == spoilt else kv for index, kv in enumerate(batch.teachers))
        losses = model(TrainBatch(batch.tokens, teachers))
        weights[spoilt] = [float(losses[f"routing/weights_mean/{name}"]) for name in BOTH]
        assert sum(weights[spoilt]) == pytest.approx(1.0)
    assert weights[0][1] > weights[1][1]
    assert weights[1][0] > weights[0][0]


def test_the_student_cannot_move_its_weights_by_similarity() -> None:
    model = model_of(fuse={"kind": "similarity"})
    fused = model(train_batch(model, BATCH))
    assert not fused["routing/weights_mean/ada"].requires_grad
    assert not fused["routing/entropy"].requires_grad


@pytest.mark.parametrize("mode", ["latent", "token"])
def test_the_router_loss_trains_router_and_adapters_and_nothing_of_the_student(mode: str) -> None:
    settings = {"align": {"head_adapter": "linear", "layer_map": "learned"}, "fuse": {"kind": "learnable"}}
    model = model_of(mode, **settings)
    batch = train_batch(model, BATCH, LATENTS if mode == "latent" else None)
    from_router = gradients(model, model(batch)["routing/router_loss"])
    assert any(name.startswith("fusion.router") for name in from_router)
    assert any("maps" in name for name in from_router)
    assert any("logits_SL" in name for name in from_router)
    assert not any(name.startswith("student") for name in from_router)
    from_kv = gradients(model, model(batch)["kv_objective"])
    assert all(name.startswith("student") for name in from_kv)
    assert not any(name.startswith("routing") for name in model.eval()(batch) if name.endswith("loss"))


def test_the_router_loss_is_the_answers_cross_entropy_and_its_gradient_that_of_the_injected_kv() -> None:
    model = model_of(fuse={"kind": "learnable"})
    batch = train_batch(model, BATCH)
    tokens = batch.tokens
    answer = model.student.read_answer(
        tokens.prompt_ids_BP, tokens.prompt_mask_BP, tokens.answer_ids_BA, tokens.answer_mask_BA
    )
    router = RouterLoss.of_latents(model.student, answer, tokens)
    k_BLHMD, v_BLHMD = (x.detach().requires_grad_() for x in (answer.k_BLHMD, answer.v_BLHMD))
    every_BM = torch.ones(k_BLHMD.shape[0], k_BLHMD.shape[3], dtype=torch.bool)
    loss = router(k_BLHMD, v_BLHMD, every_BM)
    # A student that reads its own K/V answers as it does without an injection.
    expected = cross_entropy(answer.logits_BAV, tokens.answer_ids_BA, tokens.answer_mask_BA)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    loss.backward()
    assert k_BLHMD.grad is not None
    direction = torch.randn(k_BLHMD.shape, generator=torch.Generator().manual_seed(0))
    step = 1e-2
    ahead, behind = (
        float(router(k_BLHMD.detach() + sign * step * direction, v_BLHMD.detach(), every_BM)) for sign in (1, -1)
    )
    assert (ahead - behind) / (2 * step) == pytest.approx(float((k_BLHMD.grad * direction).sum()), rel=2e-2)


def test_in_text_kv_stand_in_the_reasonings_places_and_the_answer_is_judged() -> None:
    model = model_of("token", fuse={"kind": "learnable"})
    tokens = train_batch(model, BATCH, None).tokens
    router = RouterLoss.of_text(model.student, tokens)
    for row, record in enumerate(BATCH):
        ends = tokens.text_byte_ends_BT[row].tolist()
        prompt, reasoning = len(record.prompt.encode()), len((record.prompt + record.reasoning).encode())
        inside = [prompt < end <= reasoning for end in ends]
        assert router.allowed_BM[row].tolist() == inside
        answer = [
            bool(there) and (end > reasoning or end < 0)
            for end, there in zip(ends, tokens.text_mask_BT[row], strict=True)
        ]
        assert router.target_mask_BA[row].tolist() == answer[1:]


@pytest.mark.parametrize("choose", ["soft", "top1"])
@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("router", ["mlp", "gate", "attention"])
def test_every_router_runs_in_every_shape(router: str, per_layer: bool, choose: str) -> None:
    model = model_of(fuse={"kind": "learnable", "router": router, "per_layer": per_layer, "choose": choose})
    losses = model(train_batch(model, BATCH))
    named = gradients(model, losses["loss"])
    assert any(name.startswith("fusion.router") for name in named)
    weights = [float(losses[f"routing/weights_mean/{name}"]) for name in BOTH]
    assert weights == pytest.approx([0.5, 0.5] if choose == "soft" else [1.0, 0.0])
    assert float(losses["routing/entropy"].detach()) == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-5)


def test_the_loss_is_the_sum_of_its_parts_with_the_configured_weights() -> None:
    loss = LossConfig(kv_weight=3.0, reasoning_ce_weight=0.5, codi_weight=2.0)
    model = model_of(loss=loss, fuse={"kind": "learnable", "router_loss_weight": 0.7, "entropy_weight": 0.05})
    found = {name: float(value.detach()) for name, value in model(train_batch(model, BATCH)).items()}
    expected = (
        found["answer_ce"]
        + 0.5 * found["reasoning_ce"]
        + 3.0 * found["kv_objective"]
        + 2.0 * found["codi_loss"]
        + 0.7 * found["routing/router_loss"]
        - 0.05 * found["routing/entropy"]
    )
    assert found["loss"] == pytest.approx(expected, rel=1e-6)
    assert found["codi_loss"] > 0


@pytest.mark.parametrize("method", ["linear", "nearest", "segment"])
def test_slots_are_resampled_to_the_latents(method: str) -> None:
    selection = {"selection": {"selector": "full", "span": "all"}}
    model = model_of(align={"time": method}, kv=selection)
    plain = train_batch(model, BATCH, None)
    losses = model.eval()(plain)
    assert torch.isfinite(losses["kv_loss"])
    # Slots of prompt and answer are no part of what stands for the reasoning.
    altered: list[BatchKV] = []
    for kv in plain.teachers:
        ends_BM = kv.byte_ends_BLHM[:, 0, 0]
        starts_B = torch.tensor([len(record.prompt.encode()) for record in BATCH])[:, None]
        stops_B = torch.tensor([len((record.prompt + record.reasoning).encode()) for record in BATCH])[:, None]
        outside_BM = (ends_BM <= starts_B) | (ends_BM > stops_B)
        assert kv.k_BLHMD is not None
        altered.append(replace(kv, k_BLHMD=kv.k_BLHMD + 100 * outside_BM[:, None, None, :, None]))
    changed = model(TrainBatch(plain.tokens, tuple(altered)))
    assert float(changed["kv_loss"]) == pytest.approx(float(losses["kv_loss"]), rel=1e-5)
    inside = tuple(replace(kv, v_BLHMD=kv.v_BLHMD + 1) for kv in plain.teachers if kv.v_BLHMD is not None)
    assert float(model(TrainBatch(plain.tokens, inside))["kv_loss"]) != pytest.approx(
        float(losses["kv_loss"]), rel=1e-3
    )


def test_validation_says_where_the_error_is_by_tensor_layer_and_head() -> None:
    model = model_of().eval()
    losses = model(train_batch(model, BATCH))
    assert losses["kv_error_KLH"].shape == (len(TENSORS), 2, 1)
    assert float(losses["kv_error_KLH"].mean()) == pytest.approx(float(losses["kv_loss"]), rel=1e-5)
