"""Tests of the capture of the student's K/V from its projections, with gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from kvcore.types import Tensor
from student_trainer.model.capture import capture_kv
from tests.support.tiny_models import FAMILIES, Family, build_model, tiny_spec

IDS_BT = torch.tensor([[5, 9, 31, 7, 12, 80], [200, 3, 4, 90, 11, 6]])


def model_of(family: Family, **changes: Any) -> PreTrainedModel:
    return build_model(tiny_spec(family, **changes))


def captured(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    with capture_kv(model) as capture:
        model(IDS_BT)
    return capture.columns(0, IDS_BT.shape[1])


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    k_BLHTD, v_BLHTD = captured(model)
    (k_BLHTD.sin().sum() + v_BLHTD.square().sum()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_keys_and_values_are_the_projection_outputs(family: Family) -> None:
    model: Any = model_of(family)
    k_BLHTD, v_BLHTD = captured(model)
    hidden_states = model(IDS_BT, output_hidden_states=True).hidden_states
    for number, layer in enumerate(model.model.layers):
        x_BTE = layer.input_layernorm(hidden_states[number])
        k_BTHD, v_BTHD = (
            project(x_BTE).unflatten(-1, (-1, 16)) for project in (layer.self_attn.k_proj, layer.self_attn.v_proj)
        )
        if family == "qwen3":
            k_BTHD = layer.self_attn.k_norm(k_BTHD)
        torch.testing.assert_close(k_BLHTD[:, number], k_BTHD.transpose(1, 2))
        torch.testing.assert_close(v_BLHTD[:, number], v_BTHD.transpose(1, 2))


def test_columns_returns_a_range_of_positions_in_fp32() -> None:
    model = model_of("qwen2").bfloat16()
    with capture_kv(model) as capture:
        model(IDS_BT)
    whole_k, whole_v = capture.columns(0, 6)
    k_BLHMD, v_BLHMD = capture.columns(2, 5)
    assert k_BLHMD.dtype == v_BLHMD.dtype == torch.float32
    assert k_BLHMD.equal(whole_k[:, :, :, 2:5])
    assert v_BLHMD.equal(whole_v[:, :, :, 2:5])


def test_gradients_reach_all_parameters_that_the_keys_and_values_depend_on() -> None:
    reached = gradients(model_of("qwen3", layers=2))
    expected = {f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in (0, 1) for name in "kv"}
    assert expected | {"model.embed_tokens.weight", "model.layers.1.self_attn.k_norm.weight"} <= reached.keys()
    assert "lm_head.weight" not in reached
    assert all(gradient.abs().sum() > 0 for gradient in reached.values())


# This warning is ignored because only the deprecated name exists in all supported versions of transformers.
def test_gradient_checkpointing_does_not_change_the_gradient() -> None:
    plain = model_of("qwen3").train()
    checkpointed: Any = model_of("qwen3").train()
    checkpointed.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    runs: list[int] = []
    checkpointed.model.layers[0].input_layernorm.register_forward_hook(lambda *_: runs.append(1))
    ours, theirs = gradients(checkpointed), gradients(plain)
    assert len(runs) == 2, "the layer was computed anew, so checkpointing was on"
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient)


def test_reentrant_checkpointing_is_refused() -> None:
    model: Any = model_of("qwen3").train()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(AssertionError, match="no gradient"):
        captured(model)


def hooks(model: PreTrainedModel) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_hooks_are_removed_after_the_block_and_after_an_error() -> None:
    model = model_of("qwen2")
    with capture_kv(model) as capture:
        assert hooks(model) == 6
        model(IDS_BT)
    assert hooks(model) == 0
    model(IDS_BT)
    assert len(capture.k_BHTD) == 3, "a later pass is not captured"
    with pytest.raises(IndexError), capture_kv(model):
        model(torch.tensor([[10**6]]))
    assert hooks(model) == 0


@pytest.mark.parametrize("passes", [0, 2])
def test_block_must_run_exactly_one_forward_pass(passes: int) -> None:
    model = model_of("qwen2")

    def run_passes() -> None:
        with capture_kv(model):
            for _ in range(passes):
                model(IDS_BT)

    with pytest.raises(AssertionError, match="exactly one"):
        run_passes()


def test_capture_works_without_gradients() -> None:
    with torch.no_grad():
        k_BLHTD, _ = captured(model_of("llama"))
    assert not k_BLHTD.requires_grad
