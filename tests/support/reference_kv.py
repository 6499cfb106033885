"""What a model's content keys, values and attention are, computed the slow way: fp64, one sample at a time, no padding.

Independent of the engine: eager attention, keys from the cache, un-rotated with frequencies computed here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer


@dataclass(frozen=True, slots=True)
class ReferenceKV:
    """One sample: `k_LHTD` un-rotated, `v_LHTD`, and attention probabilities by query head, `attention_LQTT`."""

    k_LHTD: Tensor
    v_LHTD: Tensor
    attention_LQTT: Tensor

    def importance(self, answer: list[int]) -> Tensor:
        """[L,H,T]: mean over the answer's tokens of the largest attention in a KV head's query group."""
        layers, heads, tokens, _ = self.k_LHTD.shape
        group = self.attention_LQTT.shape[1] // heads
        importance = torch.zeros(layers, heads, tokens, dtype=torch.float64)
        for layer in range(layers):
            for head in range(heads):
                for token in range(tokens):
                    strongest = [
                        max(float(self.attention_LQTT[layer, head * group + g, row, token]) for g in range(group))
                        for row in answer
                    ]
                    importance[layer, head, token] = sum(strongest) / len(strongest)
        return importance


def load_reference(directory: Path) -> PreTrainedModel:
    """The model in fp64 with eager attention."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, attn_implementation="eager").eval()


def reference_kv(model: PreTrainedModel, token_ids: tuple[int, ...]) -> ReferenceKV:
    """Runs one sample through transformers and undoes the rotation of its cached keys."""
    cache = DynamicCache()
    with torch.no_grad():
        output = model(torch.tensor([token_ids]), past_key_values=cache, use_cache=True, output_attentions=True)
    frequencies = _frequencies(model.config)
    layers = cast("list[DynamicLayer]", cache.layers)
    keys = [_unrotate(cast("Tensor", layer.keys)[0], frequencies) for layer in layers]
    values = [cast("Tensor", layer.values)[0] for layer in layers]
    attention = [layer[0] for layer in output.attentions]
    return ReferenceKV(torch.stack(keys), torch.stack(values), torch.stack(attention))


def _unrotate(k_HTD: Tensor, frequencies: list[float]) -> Tensor:
    """Turns each pair (i, i + D/2) at place t back by t times its frequency."""
    half = k_HTD.shape[-1] // 2
    result = torch.empty_like(k_HTD)
    for place in range(k_HTD.shape[1]):
        for i, frequency in enumerate(frequencies):
            cos, sin = math.cos(place * frequency), math.sin(place * frequency)
            x, y = k_HTD[:, place, i], k_HTD[:, place, i + half]
            result[:, place, i] = x * cos + y * sin
            result[:, place, i + half] = y * cos - x * sin
    return result


def _frequencies(config: Any) -> list[float]:
    rope = config.rope_parameters
    plain = [rope["rope_theta"] ** (-2 * i / config.head_dim) for i in range(config.head_dim // 2)]
    if rope["rope_type"] == "default":
        return plain
    assert rope["rope_type"] == "llama3"
    return [_llama3(frequency, rope) for frequency in plain]


def _llama3(frequency: float, rope: dict[str, Any]) -> float:
    original, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
    wavelength = 2 * math.pi / frequency
    if wavelength < original / high:
        return frequency
    if wavelength > original / low:
        return frequency / rope["factor"]
    share = (original / wavelength - low) / (high - low)
    return (1 - share) * frequency / rope["factor"] + share * frequency
