"""Tests of kv_projections: which modules output content keys and values, and in which order of heads and tokens."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Dots1Config,
    Dots1Model,
    Glm4MoeConfig,
    Glm4MoeModel,
    HunYuanDenseV1Config,
    HunYuanDenseV1Model,
    NanoChatConfig,
    NanoChatModel,
    Olmo3Config,
    Olmo3Model,
    OlmoeConfig,
    OlmoeModel,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeModel,
)

from kvcore.errors import UnsupportedModelError
from kvcore.tensors.projections import kv_projections
from tests.support.rotary_models import HEAD_DIM, KV_HEADS, MODELS, content_and_cache, tiny

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": HEAD_DIM}
ALL = {
    **MODELS,
    "olmo3": lambda: tiny(Olmo3Model, Olmo3Config),
    "olmoe": lambda: tiny(OlmoeModel, OlmoeConfig, num_experts=4, num_experts_per_tok=2),
    "qwen3-moe": lambda: tiny(Qwen3MoeModel, Qwen3MoeConfig, num_experts=4, **EXPERTS),
    "glm4-moe": lambda: tiny(Glm4MoeModel, Glm4MoeConfig, n_routed_experts=4, use_qk_norm=True, **EXPERTS),
    "dots1": lambda: tiny(Dots1Model, Dots1Config, n_routed_experts=4, n_shared_experts=1, **EXPERTS),
}


@cache
def model_of(name: str) -> PreTrainedModel:
    return ALL[name]()


def test_readme_states_the_number_of_configurations_and_architectures() -> None:
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    architectures = {type(model_of(name)) for name in ALL}
    assert f"| {len(ALL)} tiny configurations of {len(architectures)} architectures:" in readme


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("tokens", [1, KV_HEADS, 5])
def test_content_keys_equal_cached_keys_at_position_zero(name: str, tokens: int) -> None:
    """One case has as many tokens as heads, so that a wrong order would still have the right shape."""
    model = model_of(name)
    content, cached = content_and_cache(model, torch.zeros(3, tokens, dtype=torch.int64))
    factor = getattr(getattr(model, "rotary_emb", None) or model.model.rotary_emb, "attention_scaling", 1.0)
    for k_BHTD, cached_BHTD in zip(content, cached, strict=True):
        assert k_BHTD.shape == (3, KV_HEADS, tokens, HEAD_DIM)
        rotated = int(HEAD_DIM * (model.config.rope_parameters.get("partial_rotary_factor") or 1.0))
        torch.testing.assert_close(k_BHTD[..., :rotated] * factor, cached_BHTD[..., :rotated])
        assert torch.equal(k_BHTD[..., rotated:], cached_BHTD[..., rotated:])


@pytest.mark.parametrize("name", ALL)
def test_as_output_restores_the_modules_output_layout(name: str) -> None:
    model = model_of(name)
    outputs = []
    handles = [
        p.key.register_forward_hook(lambda _m, _i, output: outputs.append(output)) for p in kv_projections(model)
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
    for handle in handles:
        handle.remove()
    for projection, output in zip(kv_projections(model), outputs, strict=True):
        k_BHTD = projection.heads_first(output)
        assert k_BHTD.shape == (1, KV_HEADS, 3, HEAD_DIM)
        assert torch.equal(projection.as_output(k_BHTD, output), output)


@pytest.mark.parametrize(
    ("model_class", "config_class"), [(HunYuanDenseV1Model, HunYuanDenseV1Config), (NanoChatModel, NanoChatConfig)]
)
def test_models_that_normalise_rotated_keys_are_refused(model_class: Any, config_class: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"(HunYuanDenseV1|NanoChat)Attention may norm its keys"):
        kv_projections(tiny(model_class, config_class, head_dim=HEAD_DIM))
