"""Tests of RoPEScaler: removing and applying rotary embeddings, compared with the models' own."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    Cohere2Config,
    Exaone4Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    PreTrainedConfig,
    SmolLM3Config,
)

from align.rope_scale import RoPEScaler
from kvcore.errors import FieldError, UnsupportedModelError
from tests.support.rotary_models import (
    BOTH_LAYER_TYPES,
    DYNAMIC,
    LLAMA3,
    MODELS,
    POSITIONS,
    ROTATED_IN_ALL_LAYERS,
    YARN,
    cached_of_content,
    content_and_cache,
    family_model,
    model_of,
    scalers,
)


@pytest.mark.parametrize("name", ROTATED_IN_ALL_LAYERS)
@pytest.mark.parametrize("first", [0, 8192, POSITIONS - 12])
def test_unrotate_and_rotate_convert_between_cached_and_content_keys(name: str, first: int) -> None:
    model = MODELS[name]() if name == "dynamic" else model_of(name)
    positions_BT = torch.stack([torch.arange(first, first + 9), torch.arange(first + 3, first + 12)])
    content, cached = content_and_cache(model, positions_BT)
    assert len(cached) == len(content) == 2
    for scaler, k_BHTD, rotated_BHTD in zip(scalers(model), content, cached, strict=True):
        assert k_BHTD.std() > 0.1, "an absolute tolerance means something"
        assert not torch.allclose(k_BHTD, rotated_BHTD, atol=1e-2), "nothing was rotated"
        torch.testing.assert_close(scaler.unrotate(rotated_BHTD, positions_BT), k_BHTD, rtol=0, atol=1e-5)
        torch.testing.assert_close(scaler.rotate(k_BHTD, positions_BT), rotated_BHTD, rtol=0, atol=1e-5)


def test_rotation_matches_the_formula() -> None:
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


@pytest.mark.parametrize("student", [name for name in ROTATED_IN_ALL_LAYERS if name != "dynamic"])
@pytest.mark.parametrize("teacher", ["llama3-scaled", "phi", "gemma3"])
def test_content_keys_of_a_teacher_rotate_to_what_the_student_would_cache(teacher: str, student: str) -> None:
    positions_BT, own_positions_BT = torch.arange(3000, 3009)[None], torch.arange(20, 29)[None]
    _, cached = content_and_cache(model_of(teacher), positions_BT)
    content_BHTD = scalers(model_of(teacher))[1].unrotate(cached[1], positions_BT)
    expected = cached_of_content(model_of(student), content_BHTD, own_positions_BT)
    for scaler, rotated_BHTD in zip(scalers(model_of(student)), expected, strict=True):
        scaled_BHTD = scaler.rotate(content_BHTD, own_positions_BT)
        torch.testing.assert_close(scaled_BHTD, rotated_BHTD, rtol=0, atol=1e-5)
        assert not torch.allclose(rotated_BHTD, cached[1], atol=1e-2)


def test_heads_can_have_different_positions() -> None:
    scaler = RoPEScaler.from_config(family_model("llama").config)
    k_BHTD = torch.randn(2, 2, 3, 16, generator=torch.Generator().manual_seed(0))
    positions_BHT = torch.tensor([[[0, 4, 9], [1, 2, 3]], [[7, 8, 9], [0, 5, 6]]])
    k_rotated = scaler.rotate(k_BHTD, positions_BHT)
    for head in range(2):
        alone = scaler.rotate(k_BHTD[:, head : head + 1], positions_BHT[:, head])
        assert torch.equal(k_rotated[:, head : head + 1], alone)
    torch.testing.assert_close(scaler.unrotate(k_rotated, positions_BHT), k_BHTD, rtol=0, atol=1e-5)


def test_dynamic_frequencies_depend_on_the_full_sequence_length() -> None:
    """The selected tokens do not determine the sequence length, so the caller can pass it."""
    model = family_model("llama", DYNAMIC, max_position_embeddings=64)
    positions_BT = torch.arange(200)[None]
    content, cached = content_and_cache(model, positions_BT)
    scaler = RoPEScaler.from_config(model.config)
    chosen = torch.tensor([[3, 50, 120]])
    back = scaler.unrotate(cached[0][:, :, chosen[0]], chosen, length=200)
    torch.testing.assert_close(back, content[0][:, :, chosen[0]], rtol=0, atol=1e-5)
    without_length = scaler.unrotate(cached[0][:, :, chosen[0]], chosen)
    assert not torch.allclose(without_length, content[0][:, :, chosen[0]], atol=1e-2)


def test_dynamic_frequencies_of_the_longest_text_apply_until_a_short_text() -> None:
    model = MODELS["dynamic"]()
    scaler = RoPEScaler.from_config(model.config)
    for tokens, length in ((300, 300), (100, 300), (20, 20), (100, 100)):
        positions_BT = torch.arange(tokens)[None]
        content, cached = content_and_cache(model, positions_BT)
        back_BHTD = scaler.unrotate(cached[1], positions_BT, length=length)
        torch.testing.assert_close(back_BHTD, content[1], rtol=0, atol=1e-5)


def test_low_precision_keys_are_rotated_in_fp32() -> None:
    scaler = RoPEScaler.from_config(family_model("llama").config)
    k_BHTD = torch.randn(1, 1, 2, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    positions_BT = torch.tensor([[4000, 8001]])
    k_rotated = scaler.rotate(k_BHTD, positions_BT)
    assert k_rotated.dtype == torch.float32
    assert torch.equal(k_rotated, scaler.rotate(k_BHTD.float(), positions_BT))


def test_zero_selected_tokens_are_accepted() -> None:
    scaler = RoPEScaler.from_config(family_model("llama").config)
    assert scaler.unrotate(torch.zeros(2, 2, 0, 16), torch.zeros(2, 0, dtype=torch.int32)).shape == (2, 2, 0, 16)


def test_scaler_and_its_configuration_are_independent_after_construction() -> None:
    config = family_model("llama", LLAMA3).config
    before = config.to_dict()
    scaler = RoPEScaler.from_config(config)
    k_BHTD, positions_BT = torch.ones(1, 1, 1, 16), torch.tensor([[700]])
    k_rotated = scaler.rotate(k_BHTD, positions_BT)
    assert config.to_dict() == before
    config.rope_parameters["rope_theta"] = 100.0
    assert torch.equal(scaler.rotate(k_BHTD, positions_BT), k_rotated)


def test_layer_type_is_required_if_layer_types_rotate_differently() -> None:
    config = model_of("gemma3").config
    with pytest.raises(FieldError, match=r"^layer_type: Gemma3TextConfig .*sliding_attention, full_attention$"):
        RoPEScaler.from_config(config)
    with pytest.raises(FieldError, match=r"sliding_attention, full_attention; got 'local'"):
        RoPEScaler.from_config(config, "local")
    k_BHTD, positions_BT = torch.ones(1, 1, 1, 16), torch.tensor([[9]])
    sliding, full = (RoPEScaler.from_config(config, kind).rotate(k_BHTD, positions_BT) for kind in BOTH_LAYER_TYPES)
    assert not torch.allclose(sliding, full, atol=1e-2)


def test_layer_type_is_optional_if_all_layers_rotate_the_same_way() -> None:
    config = model_of("gemma2").config
    k_BHTD, positions_BT = torch.ones(1, 1, 1, 16), torch.tensor([[9]])
    named = [RoPEScaler.from_config(config, kind).rotate(k_BHTD, positions_BT) for kind in BOTH_LAYER_TYPES]
    assert all(
        torch.equal(k_rotated, RoPEScaler.from_config(config).rotate(k_BHTD, positions_BT)) for k_rotated in named
    )
    with pytest.raises(FieldError, match=r"^layer_type: LlamaConfig has layers of one type; got 'full_attention'"):
        RoPEScaler.from_config(model_of("llama").config, "full_attention")


def test_multimodal_configuration_uses_its_text_configuration() -> None:
    config = Gemma3Config(text_config=model_of("gemma3").config.to_dict())
    k_BHTD, positions_BT = torch.randn(1, 1, 3, 16), torch.tensor([[0, 7, 900]])
    k_rotated = RoPEScaler.from_config(config, "full_attention").rotate(k_BHTD, positions_BT)
    assert torch.equal(k_rotated, scalers(model_of("gemma3"))[1].rotate(k_BHTD, positions_BT))


@pytest.mark.parametrize("config", [Cohere2Config(), SmolLM3Config(), Exaone4Config()], ids=lambda c: c.model_type)
def test_models_with_unrotated_layers_are_refused(config: PreTrainedConfig) -> None:
    with pytest.raises(UnsupportedModelError, match="does not rotate"):
        RoPEScaler.from_config(config)


def test_models_without_an_invertible_rotary_embedding_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="GPT2"):
        RoPEScaler.from_config(GPT2Config())
    with pytest.raises(UnsupportedModelError, match="Gemma3TextConfig: rope type 'proportional'"):
        RoPEScaler.from_config(
            Gemma3TextConfig(
                rope_parameters={
                    "full_attention": {"rope_type": "proportional", "rope_theta": 1e4},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                }
            ),
            "full_attention",
        )
    config = family_model("llama").config
    config.rope_parameters = {"rope_type": "proportional", "rope_theta": 10000.0}
    with pytest.raises(UnsupportedModelError, match="'proportional'"):
        RoPEScaler.from_config(config)
