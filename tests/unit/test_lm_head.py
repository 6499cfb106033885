"""Tests of logits and cross-entropy from hidden states, compared with the models' own logits and with fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
)

from kvcore.errors import FieldError
from kvcore.types import Tensor
from student_trainer.model import lm_head
from student_trainer.model.latent import new_reasoning
from student_trainer.model.lm_head import check_logits, logits_of, token_cross_entropy
from tests.support.rotary_models import HEAD_DIM, tiny
from tests.support.tiny_models import FAMILIES, Family, build_model, tiny_spec

SCALED: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "granite": (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 8.0, "embedding_multiplier": 12.0}),
    "cohere": (CohereForCausalLM, CohereConfig, {"logit_scale": 0.0625}),
    "cohere2": (Cohere2ForCausalLM, Cohere2Config, {"logit_scale": 0.25}),
    "gemma": (GemmaForCausalLM, GemmaConfig, {"head_dim": HEAD_DIM}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"head_dim": HEAD_DIM, "final_logit_softcapping": 0.5}),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {"head_dim": HEAD_DIM}),
}
MASK_BT = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]]).bool()


def scaled(name: str) -> PreTrainedModel:
    model_class, config_class, extra = SCALED[name]
    return tiny(model_class, config_class, **extra)


def inputs(lm: PreTrainedModel) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden_BTE = torch.randn(3, 4, int(lm.config.hidden_size), generator=generator)
    return hidden_BTE, torch.randint(int(lm.config.vocab_size), (3, 4), generator=generator)


@pytest.mark.parametrize("name", SCALED)
@torch.no_grad()
def test_logits_have_the_scale_and_the_cap_of_the_model(name: str) -> None:
    lm = scaled(name)
    ids_BT = torch.tensor([[5, 9, 31, 7]])
    found = logits_of(lm, lm.base_model(ids_BT).last_hidden_state)
    torch.testing.assert_close(found, lm(ids_BT).logits, atol=1e-5, rtol=1e-5)
    check_logits(lm, "student.path")


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_models_pass_the_check(family: Family) -> None:
    lm = build_model(tiny_spec(family)).train()
    check_logits(lm, "student.path")
    assert lm.training


def test_a_model_that_computes_its_logits_differently_is_refused_with_the_difference() -> None:
    class Halved(type(build_model(tiny_spec("llama")))):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits / 2
            return output

    lm = Halved(build_model(tiny_spec("llama")).config)
    with pytest.raises(FieldError, match=r"student\.path: Halved computes its logits .* differs .* by 100 %"):
        check_logits(lm, "student.path")


@pytest.mark.parametrize("name", ["gemma", "gemma3"])
def test_first_latents_have_the_scale_of_the_scaled_embeddings(name: str) -> None:
    lm = scaled(name)
    with torch.no_grad():
        rms = float(lm.get_input_embeddings()(torch.arange(64)).square().mean().sqrt())
    weight = new_reasoning(lm, 64, 1, seed=0).first_inputs.weight.detach()
    assert float(weight.square().mean().sqrt()) == pytest.approx(rms, rel=0.1)


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_cross_entropy_and_its_gradients_do_not_depend_on_the_chunks(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = scaled("gemma2")
    monkeypatch.setattr(lm_head, "_CHUNK_LOGITS", chunk * 64)
    hidden_BTE, targets_BT = inputs(lm)
    hidden_BTE.requires_grad_()
    weights_BT = torch.arange(12.0).view(3, 4)
    loss_BT = token_cross_entropy(lm, hidden_BTE, targets_BT, MASK_BT)
    head: Any = lm.get_output_embeddings()
    found = torch.autograd.grad((loss_BT * weights_BT).sum(), (hidden_BTE, head.weight))
    exact = hidden_BTE.detach().double().requires_grad_(), head.weight.detach().double().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for b, t in MASK_BT.nonzero().tolist():
        logits_V = torch.tanh(exact[0][b, t] @ exact[1].T / 0.5) * 0.5
        expected = logits_V.exp().sum().log() - logits_V[targets_BT[b, t]]
        assert float(loss_BT[b, t].detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
        total = total + weights_BT[b, t] * expected
    assert not loss_BT[~MASK_BT].any()
    for gradient, reference in zip(found, torch.autograd.grad(total, exact), strict=True):
        torch.testing.assert_close(gradient.double(), reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grad", [True, False])
def test_no_more_logits_than_a_chunk_exist_and_none_of_masked_out_positions(
    grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = build_model(tiny_spec("qwen2"))
    monkeypatch.setattr(lm_head, "_CHUNK_LOGITS", 2 * int(lm.config.vocab_size))
    rows: list[int] = []
    head: Any = lm.get_output_embeddings()
    head.register_forward_hook(lambda _module, _inputs, output: rows.append(len(output)))
    hidden_BTE, targets_BT = inputs(lm)
    with torch.set_grad_enabled(grad):
        loss_BT = token_cross_entropy(lm, hidden_BTE.requires_grad_(grad), targets_BT, MASK_BT)
    assert rows == [2, 2, 1]
    if grad:
        loss_BT.sum().backward()
        assert sorted(rows) == [1, 1, 2, 2, 2, 2], "the backward pass computes each chunk's logits again"


def test_cross_entropy_of_a_bf16_model_is_computed_in_fp32() -> None:
    lm: Any = build_model(tiny_spec("qwen2"))
    lm.to(torch.bfloat16)
    hidden_BTE, targets_BT = inputs(lm)
    hidden_BTE = hidden_BTE.bfloat16()
    loss_BT = token_cross_entropy(lm, hidden_BTE, targets_BT, MASK_BT)
    assert loss_BT.dtype == torch.float32
    logits_V = logits_of(lm, hidden_BTE[1, 3]).detach().double()
    expected = math.log(float(logits_V.exp().sum())) - float(logits_V[targets_BT[1, 3]])
    assert float(loss_BT[1, 3].detach()) == pytest.approx(expected, rel=1e-5)


def test_a_batch_without_targets_has_no_loss_and_a_gradient_of_zero() -> None:
    lm = build_model(tiny_spec("qwen2"))
    hidden_BTE, targets_BT = inputs(lm)
    loss_BT = token_cross_entropy(lm, hidden_BTE.requires_grad_(), targets_BT, torch.zeros_like(MASK_BT))
    loss_BT.sum().backward()
    assert hidden_BTE.grad is not None
    assert not hidden_BTE.grad.any()
