"""Undoing and redoing rotary embeddings, against the models' own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CohereConfig,
    CohereModel,
    DynamicCache,
    Gemma3TextConfig,
    GlmConfig,
    GlmModel,
    GPT2Config,
    PreTrainedModel,
    StableLmConfig,
    StableLmModel,
)

from align.rope_scale import RoPEScaler
from kvcore.errors import UnsupportedModelError
from kvcore.projections import kv_projections
from tests.support.tiny_models import Family, TinySpec, build_model

POSITIONS = 16384
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 2048}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


def family_model(family: Family, rope: dict[str, Any] | None = None, **extra: Any) -> PreTrainedModel:
    parameters = {} if rope is None else {"rope_parameters": rope}
    return build_model(TinySpec(family=family, layers=2, max_positions=POSITIONS, extra={**parameters, **extra}))


def tiny(model_class: Any, config_class: Any, **extra: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = config_class(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        pad_token_id=0,
        **extra,
    )
    return model_class(config).eval()


MODELS = {
    "llama": lambda: family_model("llama"),
    "llama3-scaled": lambda: family_model("llama", LLAMA3),
    "linear": lambda: family_model("llama", {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
    "yarn": lambda: family_model("qwen2", YARN),
    "yarn-factor-given": lambda: family_model("llama", {**YARN, "attention_factor": 0.7}),
    "dynamic": lambda: family_model("llama", DYNAMIC, max_position_embeddings=64),
    "qwen2": lambda: family_model("qwen2", {"rope_type": "default", "rope_theta": 1000000.0}),
    "qwen3": lambda: family_model("qwen3"),
    "mistral": lambda: family_model("mistral"),
    "partial": lambda: tiny(StableLmModel, StableLmConfig, partial_rotary_factor=0.25),
    "partial-yarn": lambda: tiny(StableLmModel, StableLmConfig, rope_parameters={**YARN, "partial_rotary_factor": 0.5}),
    "interleaved": lambda: tiny(CohereModel, CohereConfig),
    "partial-interleaved": lambda: tiny(GlmModel, GlmConfig, head_dim=16, partial_rotary_factor=0.5),
}


def content_and_cache(
    model: PreTrainedModel, positions_BT: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Per layer: what entered the rotary embedding, and what the model cached."""
    content: list[torch.Tensor] = []

    def keep(projection: Any) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            content.append(projection.heads_first(output))

        return hook

    handles = [p.key.register_forward_hook(keep(p)) for p in kv_projections(model)]
    ids = torch.randint(3, 60, positions_BT.shape, generator=torch.Generator().manual_seed(1))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, position_ids=positions_BT, past_key_values=cache, use_cache=True)
    for handle in handles:
        handle.remove()
    layers: list[Any] = list(cache.layers)
    return content, [layer.keys for layer in layers]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("first", [0, 8192])
def test_a_models_cached_keys_and_its_content_keys_are_turned_into_each_other(name: str, first: int) -> None:
    model = MODELS[name]()
    positions_BT = torch.stack([torch.arange(first, first + 9), torch.arange(first + 3, first + 12)])
    content, cached = content_and_cache(model, positions_BT)
    scaler = RoPEScaler.from_config(model.config)
    assert len(cached) == 2
    for k_BHTD, rotated_BHTD in zip(content, cached, strict=True):
        assert not torch.allclose(k_BHTD, rotated_BHTD, atol=1e-2), "nothing was rotated"
        torch.testing.assert_close(scaler.unrotate(rotated_BHTD, positions_BT), k_BHTD, rtol=0, atol=1e-5)
        torch.testing.assert_close(scaler.rotate(k_BHTD, positions_BT), rotated_BHTD, rtol=0, atol=1e-5)


def test_rotation_is_the_formula() -> None:
    model = family_model("llama", {**YARN, "rope_theta": 100.0})
    scaler = RoPEScaler.from_config(model.config)
    generator = torch.Generator().manual_seed(0)
    k_BHTD = torch.randn(1, 2, 3, 16, generator=generator)
    positions = [5, 6, 40]
    frequencies = model.model.rotary_emb.inv_freq.double()
    factor = 0.1 * math.log(8.0) + 1.0
    expected = torch.zeros_like(k_BHTD, dtype=torch.float64)
    for h in range(2):
        for t, position in enumerate(positions):
            for i in range(8):
                turn = complex(math.cos(position * frequencies[i]), math.sin(position * frequencies[i])) * factor
                pair = complex(float(k_BHTD[0, h, t, i]), float(k_BHTD[0, h, t, i + 8])) * turn
                expected[0, h, t, i], expected[0, h, t, i + 8] = pair.real, pair.imag
    rotated = scaler.rotate(k_BHTD, torch.tensor([positions]))
    torch.testing.assert_close(rotated.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(scaler.unrotate(rotated, torch.tensor([positions])), k_BHTD, rtol=0, atol=1e-5)


def test_content_keys_of_another_model_become_what_this_one_would_have_cached() -> None:
    teacher, student = family_model("llama", LLAMA3), family_model("qwen2", YARN)
    positions_BT = torch.arange(100, 110)[None]
    content, cached = content_and_cache(teacher, positions_BT)
    unrotated = RoPEScaler.from_config(teacher.config).unrotate(cached[1], positions_BT)
    cos, sin = student.model.rotary_emb(content[1], positions_BT)
    half = torch.cat([-content[1][..., 8:], content[1][..., :8]], dim=-1)
    as_students = RoPEScaler.from_config(student.config).rotate(unrotated, positions_BT)
    torch.testing.assert_close(as_students, content[1] * cos[:, None] + half * sin[:, None], rtol=0, atol=1e-5)


def test_heads_may_hold_tokens_of_different_positions() -> None:
    scaler = RoPEScaler.from_config(family_model("llama").config)
    k_BHTD = torch.randn(2, 2, 3, 16, generator=torch.Generator().manual_seed(0))
    positions_BHT = torch.tensor([[[0, 4, 9], [1, 2, 3]], [[7, 8, 9], [0, 5, 6]]])
    turned = scaler.rotate(k_BHTD, positions_BHT)
    for head in range(2):
        alone = scaler.rotate(k_BHTD[:, head : head + 1], positions_BHT[:, head])
        assert torch.equal(turned[:, head : head + 1], alone)
    torch.testing.assert_close(scaler.unrotate(turned, positions_BHT), k_BHTD, rtol=0, atol=1e-5)


def test_dynamic_frequencies_follow_the_length_of_the_whole_sequence() -> None:
    """Selected tokens alone don't tell how long the sequence was, so it can be given."""
    model = family_model("llama", DYNAMIC, max_position_embeddings=64)
    positions_BT = torch.arange(200)[None]
    content, cached = content_and_cache(model, positions_BT)
    scaler = RoPEScaler.from_config(model.config)
    chosen = torch.tensor([[3, 50, 120]])
    back = scaler.unrotate(cached[0][:, :, chosen[0]], chosen, length=200)
    torch.testing.assert_close(back, content[0][:, :, chosen[0]], rtol=0, atol=1e-5)
    guessed = scaler.unrotate(cached[0][:, :, chosen[0]], chosen)
    assert not torch.allclose(guessed, content[0][:, :, chosen[0]], atol=1e-2)


def test_low_precision_keys_are_turned_in_fp32() -> None:
    scaler = RoPEScaler.from_config(family_model("llama").config)
    k_BHTD = torch.randn(1, 1, 2, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    positions_BT = torch.tensor([[4000, 8001]])
    turned = scaler.rotate(k_BHTD, positions_BT)
    assert turned.dtype == torch.float32
    assert torch.equal(turned, scaler.rotate(k_BHTD.float(), positions_BT))


def test_no_selected_token_is_no_problem() -> None:
    scaler = RoPEScaler.from_config(family_model("llama").config)
    assert scaler.unrotate(torch.zeros(2, 2, 0, 16), torch.zeros(2, 0, dtype=torch.int32)).shape == (2, 2, 0, 16)


def test_a_scaler_and_the_configuration_it_was_made_from_do_not_change_each_other() -> None:
    config = family_model("llama", LLAMA3).config
    before = config.to_dict()
    scaler = RoPEScaler.from_config(config)
    k_BHTD, positions_BT = torch.ones(1, 1, 1, 16), torch.tensor([[700]])
    turned = scaler.rotate(k_BHTD, positions_BT)
    assert config.to_dict() == before
    config.rope_parameters["rope_theta"] = 100.0
    assert torch.equal(scaler.rotate(k_BHTD, positions_BT), turned)


def test_models_without_a_rotary_embedding_we_can_undo_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="GPT2"):
        RoPEScaler.from_config(GPT2Config())
    with pytest.raises(UnsupportedModelError, match="Gemma3"):
        RoPEScaler.from_config(Gemma3TextConfig())
    config = family_model("llama").config
    config.rope_parameters = {"rope_type": "proportional", "rope_theta": 10000.0}
    with pytest.raises(UnsupportedModelError, match="'proportional'"):
        RoPEScaler.from_config(config)
