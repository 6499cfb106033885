"""What vLLM is started with, and which models it is refused."""

from __future__ import annotations

import json
import os
from typing import Any, cast

import torch
from transformers import PreTrainedConfig

from align.rope_scale import RoPEScaler
from kvcore.errors import FieldError, UnsupportedModelError
from teacher_server.config import ServeConfig
from teacher_server.engines.hf.hf_engine import DtypeName

VLLM_DTYPES: dict[DtypeName, str] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# What the engine sets itself, and what would change keys or values on their way into the cache.
OWN_ARGUMENTS = frozenset(
    {
        "model",
        "tokenizer",
        "revision",
        "dtype",
        "max_model_len",
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "gpu_memory_utilization",
        "trust_remote_code",
        "kv_transfer_config",
        "kv_cache_dtype",
        "kv_offloading_backend",
        "kv_offloading_size",
        "quantization",
        "speculative_config",
        "enable_lora",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
        "enforce_eager",
        "hf_overrides",
        "kv_sharing_fast_prefill",
        "data_parallel_size",
    }
)
LONG_ROPE = ("dynamic", "longrope")


def check_supported(config: ServeConfig, model: PreTrainedConfig) -> None:
    """Refuses models whose keys or values are not in the cache as they were computed."""
    text_config = cast("Any", model.get_text_config())
    name = f"'{config.model}'"
    if getattr(model, "quantization_config", None):
        raise UnsupportedModelError(f"{name}: quantised weights cannot be compared with transformers; serve them there")
    if getattr(text_config, "sliding_window", None) and getattr(text_config, "use_sliding_window", True):
        raise UnsupportedModelError(
            f"{name}: vLLM lets go of tokens beyond a sliding window; serve it with --engine hf"
        )
    rope = dict(getattr(text_config, "rope_parameters", None) or {})
    if rope.get("rope_type") in LONG_ROPE:
        raise UnsupportedModelError(f"{name}: vLLM and transformers rotate '{rope['rope_type']}' differently")
    RoPEScaler.from_config(model)


def longest_sample(config: ServeConfig, model: PreTrainedConfig) -> int:
    """The most tokens of a sample.

    Raises:
        FieldError: more is asked for than the model reads.
    """
    context = cast("int", cast("Any", model.get_text_config()).max_position_embeddings)
    longest = min(config.max_model_len or context, config.max_sample_tokens or context)
    for field in ("max_model_len", "max_sample_tokens"):
        asked = getattr(config, field)
        if asked is not None and asked > context:
            raise FieldError(field, f"got {asked}; the model reads at most {context} tokens")
    return longest


def engine_arguments(config: ServeConfig, dtype: DtypeName, longest: int, known: frozenset[str]) -> dict[str, Any]:
    """What vLLM is started with."""
    try:
        extra = json.loads(config.vllm_args)
    except ValueError as error:
        raise FieldError("vllm_args", f"is no JSON: {error}") from error
    if not isinstance(extra, dict):
        raise FieldError("vllm_args", f"got {config.vllm_args}; it is a JSON object")
    if unknown := sorted(set(extra) - known):
        raise FieldError("vllm_args", f"'{unknown[0]}' is none of vLLM's engine arguments")
    if taken := sorted(OWN_ARGUMENTS & set(extra)):
        raise FieldError("vllm_args", f"'{taken[0]}' is set by the server's own flags, or cannot be changed")
    # vLLM counts the token that it writes; the last position that it rotates is the sample's own.
    os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    arguments: dict[str, Any] = {
        "model": config.model,
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
        "dtype": VLLM_DTYPES[dtype],
        "max_model_len": longest + 1,
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        # Prompts gain nothing from captured graphs, and queries can only be seen without them.
        "enforce_eager": True,
        "enable_log_requests": False,
        "disable_log_stats": True,
    }
    if torch.cuda.is_available():
        arguments["attention_backend"] = "FLASH_ATTN"
    else:
        arguments["block_size"] = 32
    return {**arguments, **extra}
