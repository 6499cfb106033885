"""vLLM on the CPU with tiny models and small caches. vLLM starts slowly, so all tests of a model share one engine."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from teacher_server.config import ServeConfig
from teacher_server.engines import load_engine
from teacher_server.engines.hf.hf_engine import HFEngine
from teacher_server.engines.vllm.vllm_engine import VLLMEngine
from tests.support.tiny_models import save_tiny_model, tiny_spec

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

# A pass of 48 tokens splits most prompts. 24 blocks of 32 tokens hold one and a half prompts of 512 tokens, so that
# requests preempt each other.
CROWDED = {
    "max_num_batched_tokens": 48,
    "num_gpu_blocks_override": 24,
    "max_num_seqs": 8,
    # No prompt fills a pass or reserves its blocks, so several prompts grow together until one is preempted.
    "long_prefill_token_threshold": 16,
    "scheduler_reserve_full_isl": False,
}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "qwen2": ({"family": "qwen2"}, {}, 1),
    # One KV head for four query heads, and a scaled rotary embedding.
    # Its statistics are on, so that tests can read them. vLLM shows the statistics of the last such engine only.
    "llama": ({"family": "llama", "kv_heads": 1}, {**CROWDED, "disable_log_stats": False}, 1),
    # Has query and key norms. Each of two ranks computes one KV head.
    "qwen3": ({"family": "qwen3", "head_dim": 64}, CROWDED, 2),
}


@dataclass(frozen=True)
class Pair:
    """The same model on both engines. `counts` is whether vLLM's statistics are on."""

    counts: bool
    directory: Path
    vllm: VLLMEngine
    hf: HFEngine


def save_model(name: str, directory: Path) -> Path:
    """Save one of MODELS. vLLM's CPU attention supports head dimensions from 32 on."""
    geometry = {"head_dim": 32, "hidden": 128, **MODELS[name][0]}
    return save_tiny_model(directory, tiny_spec(**geometry))


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Pair]]:
    """Start a model when the first test needs it."""

    def build(name: str) -> Pair:
        if name not in made:
            _, arguments, ranks = MODELS[name]
            directory = save_model(name, tmp_path_factory.mktemp(name))
            config = ServeConfig(
                model=str(directory), engine="vllm", tensor_parallel_size=ranks, vllm_args=json.dumps(arguments)
            )
            vllm = load_engine(config)
            hf = load_engine(ServeConfig(model=str(directory), device="cpu", dtype="fp32"))
            assert isinstance(vllm, VLLMEngine)
            assert isinstance(hf, HFEngine)
            made[name] = Pair("disable_log_stats" in arguments, directory, vllm, hf)
        return made[name]

    made: dict[str, Pair] = {}
    yield build
    for pair in made.values():
        pair.vllm.close()
        pair.hf.close()


@pytest.fixture(params=MODELS)
def pair(request: pytest.FixtureRequest, pairs: Callable[[str], Pair]) -> Pair:
    return pairs(request.param)
