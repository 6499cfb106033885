"""Reference for a model's content keys, values and attention, in fp64, one sample at a time and without padding.

Independent of the engine: eager attention, and keys from the cache, un-rotated with frequencies computed here. The
attention is also computed in plain Python from the projections of the model.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kvcore.plan import ImportancePool


@dataclass(frozen=True, slots=True)
class ReferenceKV:
    """One sample: `k_LHTD` un-rotated, `v_LHTD`, and attention probabilities by query head, `attention_LQTT`."""

    k_LHTD: Tensor
    v_LHTD: Tensor
    attention_LQTT: Tensor

    def importance(self, answer: list[int], pool: ImportancePool = "max") -> Tensor:
        """[L,H,T]: mean over the answer's tokens of the largest (or mean) attention in a KV head's query group."""
        layers, heads, tokens, _ = self.k_LHTD.shape
        group = self.attention_LQTT.shape[1] // heads
        importance = torch.zeros(layers, heads, tokens, dtype=torch.float64)
        for layer in range(layers):
            for head in range(heads):
                for token in range(tokens):
                    pooled = [
                        pool_group(
                            [float(self.attention_LQTT[layer, head * group + g, row, token]) for g in range(group)],
                            pool,
                        )
                        for row in answer
                    ]
                    importance[layer, head, token] = sum(pooled) / len(pooled)
        return importance


@dataclass(frozen=True, slots=True)
class PlainLayer:
    """One layer of one sample as Python numbers: content keys `k[head][token]` and queries `q[head][token]`."""

    k: list[list[list[float]]]
    q: list[list[list[float]]]

    def importance(self, answer: list[int], pool: ImportancePool, config: Any) -> list[list[float]]:
        """[H][T]: rotate, scale, softmax over the visible keys, pool the query group, mean over the answer."""
        frequencies = _frequencies(config)
        group = len(self.q) // len(self.k)
        keys = [[_rotate(key, at, frequencies) for at, key in enumerate(head)] for head in self.k]
        importance = []
        for kv_head, rotated in enumerate(keys):
            total = [0.0] * len(rotated)
            for row in answer:
                queries = [_rotate(self.q[kv_head * group + g][row], row, frequencies) for g in range(group)]
                attention = [_attention(query, rotated, row, config) for query in queries]
                for token in range(len(rotated)):
                    total[token] += pool_group([one[token] for one in attention], pool)
            importance.append([value / len(answer) for value in total])
        return importance


def pool_group(values: list[float], pool: ImportancePool) -> float:
    """Pool the values of the query heads of one KV head."""
    return max(values) if pool == "max" else sum(values) / len(values)


def plain_layers(model: PreTrainedModel, token_ids: tuple[int, ...]) -> list[PlainLayer]:
    """Run one sample through the fp64 model and return the projections of each layer, before any rotation."""
    seen: dict[tuple[int, str], list[list[list[float]]]] = {}
    layers = cast("Any", model).model.layers
    with torch.no_grad(), ExitStack() as stack:
        for index, layer in enumerate(layers):
            for name in ("k", "q"):
                # A norm, if there is one, comes after the projection.
                module = getattr(layer.self_attn, f"{name}_norm", None) or getattr(layer.self_attn, f"{name}_proj")

                def note(_module: Any, _inputs: Any, output: Tensor, where: tuple[int, str] = (index, name)) -> None:
                    by_token = output[0].unflatten(-1, (-1, model.config.head_dim)) if output.dim() == 3 else output[0]
                    seen[where] = by_token.transpose(0, 1).tolist()

                stack.callback(module.register_forward_hook(note).remove)
        model(torch.tensor([token_ids]))
    return [PlainLayer(seen[index, "k"], seen[index, "q"]) for index in range(len(layers))]


def _rotate(x: list[float], place: int, frequencies: list[float]) -> list[float]:
    half = len(frequencies)
    turned = list(x)
    for i, frequency in enumerate(frequencies):
        cos, sin = math.cos(place * frequency), math.sin(place * frequency)
        turned[i] = x[i] * cos - x[i + half] * sin
        turned[i + half] = x[i + half] * cos + x[i] * sin
    return turned


def _attention(query: list[float], keys: list[list[float]], row: int, config: Any) -> list[float]:
    """Probabilities over all keys: 0 for those after the query or before its window."""
    window = getattr(config, "sliding_window", None) or len(keys)
    exponentials = [0.0] * len(keys)
    for at in range(max(0, row - window + 1), row + 1):
        score = sum(a * b for a, b in zip(query, keys[at], strict=True)) / math.sqrt(config.head_dim)
        exponentials[at] = math.exp(score)
    return [value / sum(exponentials) for value in exponentials]


def load_reference(directory: Path) -> PreTrainedModel:
    """The model in fp64 with eager attention."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, attn_implementation="eager").eval()


def reference_kv(model: PreTrainedModel, token_ids: tuple[int, ...]) -> ReferenceKV:
    """Run one sample through transformers and un-rotate its cached keys."""
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
    """Rotate each pair (i, i + D/2) at position t back by t times its frequency."""
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
