"""Models with random weights: two teachers of different families and geometry, and a smaller student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from experiments.demo.demo_config import ModelName

Geometry = dict[str, Any]

_COMMON: Geometry = {
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    # The families' default is 0.02. These models are narrow and learn faster with a wider range.
    "initializer_range": 0.06,
}
GEOMETRIES: dict[ModelName, Geometry] = {
    "teacher_a": {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "teacher_b": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
    "student": {
        "hidden_size": 48,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
}
SEEDS: dict[ModelName, int] = {"teacher_a": 1, "teacher_b": 2, "student": 3}
_LLAMA_SHAPED = frozenset({"teacher_b"})


def make_model(name: ModelName, tokenizer: PreTrainedTokenizerBase, directory: Path, seed: int | None = None) -> None:
    """Writes a model with random weights and its tokenizer to a directory that transformers loads."""
    special = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    settings = _COMMON | GEOMETRIES[name] | special
    with torch.random.fork_rng():
        torch.manual_seed(SEEDS[name] if seed is None else seed)
        if name in _LLAMA_SHAPED:
            model = LlamaForCausalLM(LlamaConfig(**settings))
        else:
            model = Qwen2ForCausalLM(Qwen2Config(**settings))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
