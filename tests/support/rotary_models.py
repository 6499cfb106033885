"""Tiny random models with many kinds of rotary embedding, and their keys before and after it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import (
    ApertusConfig,
    ApertusModel,
    CohereConfig,
    CohereModel,
    DynamicCache,
    Exaone4Config,
    Exaone4Model,
    Gemma2Config,
    Gemma2Model,
    Gemma3TextConfig,
    Gemma3TextModel,
    GemmaConfig,
    GemmaModel,
    GlmConfig,
    GlmModel,
    Olmo2Config,
    Olmo2Model,
    PhiConfig,
    PhiModel,
    PreTrainedModel,
    StableLmConfig,
    StableLmModel,
)

from align.rope_scale import RoPEScaler
from kvcore.tensors.projections import KVProjection, kv_projections
from kvcore.types import Tensor
from tests.support.tiny_models import Family, TinySpec, build_model, randomise

POSITIONS = 32768
LAYERS, KV_HEADS, HEAD_DIM = 2, 2, 16
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 4096}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
# As in the larger Gemma 3 models: a small theta in sliding-window layers, a large and scaled one in full attention.
BY_LAYER_TYPE = {
    "sliding_attention": DEFAULT,
    "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
}
BOTH_LAYER_TYPES = ["sliding_attention", "full_attention"]


def family_model(family: Family, rope: dict[str, Any] | None = None, **extra: Any) -> PreTrainedModel:
    """A tiny model of `tests.support.tiny_models` with these rotary parameters."""
    parameters = {} if rope is None else {"rope_parameters": rope}
    return build_model(TinySpec(family=family, layers=LAYERS, max_positions=POSITIONS, extra={**parameters, **extra}))


def tiny(model_class: Any, config_class: Any, **extra: Any) -> PreTrainedModel:
    """A tiny random model of another family."""
    sizes = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": POSITIONS,
        "pad_token_id": 0,
    }
    model = model_class(config_class(**{**sizes, **extra}))
    randomise(model, seed=0)
    return model.eval()


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: family_model("llama"),
    "llama3-scaled": lambda: family_model("llama", LLAMA3),
    "linear": lambda: family_model("llama", LINEAR),
    "yarn": lambda: family_model("qwen2", YARN),
    "yarn-factor-given": lambda: family_model("llama", {**YARN, "attention_factor": 0.7}),
    "dynamic": lambda: family_model("llama", DYNAMIC, max_position_embeddings=64),
    "qwen2": lambda: family_model("qwen2", {"rope_type": "default", "rope_theta": 1000000.0}),
    "qwen3": lambda: family_model("qwen3"),
    "mistral": lambda: family_model("mistral"),
    "phi": lambda: tiny(PhiModel, PhiConfig, partial_rotary_factor=0.5),
    "phi-qk-norm": lambda: tiny(PhiModel, PhiConfig, partial_rotary_factor=0.25, qk_layernorm=True),
    "gemma": lambda: tiny(GemmaModel, GemmaConfig, head_dim=HEAD_DIM),
    "gemma2": lambda: tiny(Gemma2Model, Gemma2Config, head_dim=HEAD_DIM),
    "gemma3": lambda: tiny(
        Gemma3TextModel,
        Gemma3TextConfig,
        head_dim=HEAD_DIM,
        layer_types=BOTH_LAYER_TYPES,
        rope_parameters=BY_LAYER_TYPE,
    ),
    "stablelm": lambda: tiny(StableLmModel, StableLmConfig, partial_rotary_factor=0.25),
    "stablelm-qk-norm": lambda: tiny(StableLmModel, StableLmConfig, partial_rotary_factor=0.25, qk_layernorm=True),
    "partial-yarn": lambda: tiny(StableLmModel, StableLmConfig, rope_parameters={**YARN, "partial_rotary_factor": 0.5}),
    "cohere": lambda: tiny(CohereModel, CohereConfig),
    "cohere-qk-norm": lambda: tiny(CohereModel, CohereConfig, use_qk_norm=True),
    "glm": lambda: tiny(GlmModel, GlmConfig, head_dim=HEAD_DIM, partial_rotary_factor=0.5),
    "olmo2": lambda: tiny(Olmo2Model, Olmo2Config),
    "apertus": lambda: tiny(ApertusModel, ApertusConfig, rope_parameters=LLAMA3),
    "exaone4": lambda: tiny(Exaone4Model, Exaone4Config, sliding_window=None, layer_types=["full_attention"] * LAYERS),
}
ROTATED_IN_ALL_LAYERS = [name for name in MODELS if name != "exaone4"]


@cache
def model_of(name: str) -> PreTrainedModel:
    """One of `MODELS`, built once. Tests build `dynamic` models themselves, because a forward pass changes those."""
    return MODELS[name]()


def scalers(model: PreTrainedModel) -> list[RoPEScaler]:
    """The RoPE scaler of each layer."""
    types = getattr(model.config, "layer_types", None) or [None] * LAYERS
    return [RoPEScaler.from_config(model.config, layer_type) for layer_type in types]


def content_and_cache(model: PreTrainedModel, positions_BT: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Per layer: the keys before the rotary embedding, and the cached keys."""
    content: list[Tensor] = []

    def keep(projection: KVProjection, output: Tensor) -> None:
        content.append(projection.heads_first(output))

    return content, _cached_keys(model, positions_BT, keep)


def cached_of_content(model: PreTrainedModel, content_BHTD: Tensor, positions_BT: Tensor) -> list[Tensor]:
    """Per layer: the cached keys if `content_BHTD` replaces the model's keys before the rotary embedding."""

    def replace(projection: KVProjection, output: Tensor) -> Tensor:
        return projection.as_output(content_BHTD, output)

    return _cached_keys(model, positions_BT, replace)


def _cached_keys(
    model: PreTrainedModel, positions_BT: Tensor, hook: Callable[[KVProjection, Tensor], Tensor | None]
) -> list[Tensor]:
    def on_output(projection: KVProjection) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        return lambda _module, _inputs, output: hook(projection, output)

    handles = [projection.key.register_forward_hook(on_output(projection)) for projection in kv_projections(model)]
    ids_BT = torch.randint(3, 60, positions_BT.shape, generator=torch.Generator().manual_seed(1))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids_BT, position_ids=positions_BT, past_key_values=cache, use_cache=True)
    for handle in handles:
        handle.remove()
    layers: list[Any] = list(cache.layers)
    return [layer.keys for layer in layers]
