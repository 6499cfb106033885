"""Tiny random models of the supported families, saved as directories that transformers loads.

Every parameter is random, biases and norm weights too, so that a test fails if the code ignores one of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

Family = Literal["llama", "qwen2", "qwen3", "mistral"]
FAMILIES: tuple[Family, ...] = ("llama", "qwen2", "qwen3", "mistral")

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
CORPUS = (
    "The start is 3. Add 4, then multiply by 2 and subtract 5, all modulo 7.",
    "Reasoning: 3 + 4 = 7, so 0; 0 x 2 = 0; 0 - 5 = 2. The answer is 2.",
    "思考过程:三加四等于七。答案是二。",
    "Größe, naïve café, Ελληνικά, русский текст, 🙂🙃 and 👩‍👩‍👧.",
)


@dataclass(frozen=True, slots=True)
class TinySpec:
    """Geometry of a tiny model; `extra` goes to the family's configuration as it is."""

    family: Family = "llama"
    layers: int = 3
    hidden: int = 48
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    max_positions: int = 512
    rope_theta: float = 10000.0
    vocabulary: int = 384
    seed: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


_CLASSES: dict[Family, tuple[type[Any], type[PreTrainedModel]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}

# The special features of each family, scaled down so that short samples use them: sliding window, scaled RoPE.
_FAMILY_EXTRAS: dict[Family, dict[str, Any]] = {
    "llama": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        }
    },
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 12},
}


def tiny_spec(family: Family, **changes: Any) -> TinySpec:
    """The default tiny geometry of a family, with its special feature (sliding window, RoPE scaling)."""
    extra = {**_FAMILY_EXTRAS[family], **changes.pop("extra", {})}
    return TinySpec(family=family, extra=extra, **changes)


def build_model(spec: TinySpec) -> PreTrainedModel:
    """A random model in eval mode, fp32, the same for the same specification."""
    config_class, model_class = _CLASSES[spec.family]
    arguments: dict[str, Any] = {
        "vocab_size": spec.vocabulary,
        "hidden_size": spec.hidden,
        "intermediate_size": 2 * spec.hidden,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.max_positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rope_theta},
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    model = model_class(config_class(**{**arguments, **spec.extra}))
    randomise(model, spec.seed)
    return model.eval()


def randomise(model: PreTrainedModel, seed: int) -> None:
    """Randomise every parameter: weights so that activations keep their scale, vectors around their current values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(parameter + 0.3 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)


def build_tokenizer(family: Family, vocabulary: int = 384) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer like the family's. Llama and Mistral add a BOS; Qwen does not."""
    adds_bos = family in ("llama", "mistral")
    tokenizer = Tokenizer(models.BPE())
    split = LLAMA3_SPLIT if adds_bos else QWEN_SPLIT
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(CORPUS) * 4, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def save_tiny_model(directory: Path, spec: TinySpec) -> Path:
    """Save a model and its tokenizer as safetensors and JSON, and return the directory."""
    build_model(spec).save_pretrained(directory)
    build_tokenizer(spec.family, spec.vocabulary).save_pretrained(str(directory))
    return directory
