"""vLLM's engine arguments, and the models that are not supported on vLLM."""

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
# Arguments that the engine sets itself, or that would change the keys or values in the cache.
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
    """Refuse models whose keys or values do not stay in the cache as they were computed.

    Raises:
        UnsupportedModelError: names the model and the reason.
    """
    text_config = cast("Any", model.get_text_config())
    name = f"'{config.model}'"
    if getattr(model, "quantization_config", None):
        raise UnsupportedModelError(
            f"{name}: quantised weights cannot be compared with transformers; serve it with --engine hf"
        )
    if getattr(text_config, "sliding_window", None) and getattr(text_config, "use_sliding_window", True):
        raise UnsupportedModelError(f"{name}: vLLM frees tokens beyond a sliding window; serve it with --engine hf")
    rope = dict(getattr(text_config, "rope_parameters", None) or {})
    if rope.get("rope_type") in LONG_ROPE:
        raise UnsupportedModelError(f"{name}: vLLM and transformers rotate '{rope['rope_type']}' differently")
    RoPEScaler.from_config(model)


def longest_sample(config: ServeConfig, model: PreTrainedConfig) -> int:
    """The maximum number of tokens in a sample.

    Raises:
        FieldError: the configured limit exceeds the model's context.
    """
    context = cast("int", cast("Any", model.get_text_config()).max_position_embeddings)
    longest = min(config.max_model_len or context, config.max_sample_tokens or context)
    for field in ("max_model_len", "max_sample_tokens"):
        requested = getattr(config, field)
        if requested is not None and requested > context:
            raise FieldError(field, f"got {requested}; the model takes at most {context} tokens")
    return longest


def engine_arguments(config: ServeConfig, dtype: DtypeName, longest: int, known: frozenset[str]) -> dict[str, Any]:
    """The keyword arguments of vLLM's engine.

    Args:
        config: of the server.
        dtype: of weights and cache.
        longest: the maximum number of tokens in a sample.
        known: names of all arguments that vLLM accepts.

    Raises:
        FieldError: `vllm_args` is not a JSON object of arguments that may be set.
    """
    try:
        extra = json.loads(config.vllm_args)
    except ValueError as error:
        raise FieldError("vllm_args", f"is not JSON: {error}") from error
    if not isinstance(extra, dict):
        raise FieldError("vllm_args", f"got {config.vllm_args}; it must be a JSON object")
    if unknown := sorted(set(extra) - known):
        raise FieldError("vllm_args", f"'{unknown[0]}' is not an engine argument of vLLM")
    if taken := sorted(OWN_ARGUMENTS & set(extra)):
        raise FieldError("vllm_args", f"'{taken[0]}' is set by the server's own flags, or cannot be changed")
    # max_model_len includes the generated token, but vLLM rotates no position beyond the sample.
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
        # CUDA graphs do not speed up prefill, and the hooks that see queries need eager mode.
        "enforce_eager": True,
        "enable_log_requests": False,
        "disable_log_stats": True,
    }
    if torch.cuda.is_available():
        arguments["attention_backend"] = "FLASH_ATTN"
    else:
        arguments["block_size"] = 32
    return {**arguments, **extra}
