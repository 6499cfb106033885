"""Tests of the vLLM engine's arguments, refused flags and models, and the self-test of reading the cache."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import GPT2Config, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from kvcore.errors import FieldError, UnsupportedModelError
from kvcore.types import Tensor
from teacher_server.app import TeacherServer
from teacher_server.config import ServeConfig
from teacher_server.engines import load_engine
from teacher_server.engines.base import (
    Emit,
    ExecutionTimings,
    Fail,
    LayerOutput,
    LayerSink,
    PlannedSample,
    SampleFailure,
    TokenizedSample,
    Wanted,
)
from teacher_server.engines.fake import FakeEngine, FakeModel
from teacher_server.engines.vllm.vllm_self_test import TOKENS, check_against
from teacher_server.engines.vllm.vllm_settings import OWN_ARGUMENTS, check_supported, engine_arguments, longest_sample

KNOWN = OWN_ARGUMENTS | {"max_num_batched_tokens", "block_size", "attention_backend", "distributed_executor_backend"}


def serve(**fields: Any) -> ServeConfig:
    return ServeConfig.model_validate({"model": "some/model", "engine": "vllm", **fields})


# ---------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tensor_parallel_size", 2),
        ("pipeline_parallel_size", 2),
        ("max_model_len", 100),
        ("gpu_memory_utilization", 0.5),
        ("worker_address", "10.0.0.1:6000"),
        ("vllm_args", '{"block_size": 32}'),
    ],
)
@pytest.mark.parametrize("engine", ["hf", "fake"])
def test_other_engines_refuse_vllms_flags(engine: str, field: str, value: object) -> None:
    assert getattr(serve(**{field: value}), field) == value
    with pytest.raises(ValidationError, match=f"{field}: needs the engine 'vllm'; the engine is '{engine}'"):
        serve(engine=engine, model="fake:", **{field: value})


@pytest.mark.parametrize(("field", "value"), [("load_in_8bit", True), ("load_in_4bit", True), ("threads", 2)])
def test_vllm_refuses_flags_of_other_engines(field: str, value: object) -> None:
    with pytest.raises(ValidationError, match=f"{field}: is not supported by the engine 'vllm'"):
        serve(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tensor_parallel_size", 0),
        ("pipeline_parallel_size", 0),
        ("max_model_len", 0),
        ("gpu_memory_utilization", 0.0),
        ("gpu_memory_utilization", 1.1),
        ("worker_address", "no-port"),
        ("worker_address", "10.0.0.1:0"),
        ("worker_address", "10.0.0.1:65536"),
    ],
)
def test_values_out_of_range_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValidationError, match=field):
        serve(**{field: value})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not JSON"),
        ("[1]", "it must be a JSON object"),
        ('{"max_batched": 3}', "'max_batched' is not an engine argument of vLLM"),
        *((json.dumps({name: 1}), f"'{name}' is set by the server's own flags") for name in sorted(OWN_ARGUMENTS)),
    ],
)
def test_reserved_or_invalid_vllm_arguments_are_refused(text: str, reason: str) -> None:
    with pytest.raises(FieldError, match=reason) as caught:
        engine_arguments(serve(vllm_args=text), "fp32", 100, frozenset(KNOWN))
    assert caught.value.field == "vllm_args"


def test_engine_arguments_follow_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "0")
    config = serve(
        tensor_parallel_size=8,
        pipeline_parallel_size=2,
        gpu_memory_utilization=0.8,
        vllm_args='{"max_num_batched_tokens": 9, "block_size": 64}',
    )
    arguments = engine_arguments(config, "bf16", 100, frozenset(KNOWN))
    expected = {
        "model": "some/model",
        "tensor_parallel_size": 8,
        "pipeline_parallel_size": 2,
        "gpu_memory_utilization": 0.8,
        "dtype": "bfloat16",
        # The generated token counts as well.
        "max_model_len": 101,
        "max_num_batched_tokens": 9,
        "block_size": 64,
        "enforce_eager": True,
    }
    assert expected.items() <= arguments.items()
    assert os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] == "0", "what a person has set stays"


def test_max_model_len_may_exceed_the_context_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "")
    monkeypatch.delenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN")
    engine_arguments(serve(), "fp32", 100, frozenset(KNOWN))
    assert os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] == "1"


# ---------------------------------------------------------------------------------------------------- models

SMALL: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": 512}


def rope(kind: str, **parameters: object) -> dict[str, object]:
    return {"rope_type": kind, "rope_theta": 10000.0, **parameters}


def quantised(config: PreTrainedConfig) -> PreTrainedConfig:
    config.quantization_config = {"quant_method": "fp8"}
    return config


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (MistralConfig(**SMALL, sliding_window=128), "sliding window; serve it with --engine hf"),
        (Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=128), "sliding window"),
        (quantised(LlamaConfig(**SMALL)), "quantised weights"),
        (LlamaConfig(**SMALL, rope_parameters=rope("dynamic", factor=2.0)), "rotate 'dynamic' differently"),
        (
            LlamaConfig(
                **SMALL, rope_parameters=rope("longrope", factor=2.0, short_factor=[1.0] * 8, long_factor=[1.0] * 8)
            ),
            "rotate 'longrope' differently",
        ),
        (GPT2Config(), "no standard rotary embedding"),
    ],
    ids=["window", "window of qwen2", "quantised", "dynamic", "longrope", "no rotation"],
)
def test_models_without_exact_kv_in_their_cache_are_refused(model: PreTrainedConfig, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        check_supported(serve(), model)


@pytest.mark.parametrize(
    "model",
    [
        LlamaConfig(**SMALL),
        LlamaConfig(**SMALL, rope_parameters=rope("linear", factor=2.0)),
        MistralConfig(**SMALL, sliding_window=None),
        Qwen2Config(**SMALL, use_sliding_window=False, sliding_window=128),
        Qwen3Config(**SMALL),
    ],
    ids=["llama", "linear", "mistral", "qwen2", "qwen3"],
)
def test_supported_models_are_accepted(model: PreTrainedConfig) -> None:
    check_supported(serve(), model)


@pytest.mark.parametrize(
    ("limits", "longest"),
    [
        ({}, 512),
        ({"max_model_len": 512}, 512),
        ({"max_model_len": 100}, 100),
        ({"max_sample_tokens": 100}, 100),
        ({"max_model_len": 200, "max_sample_tokens": 100}, 100),
        ({"max_model_len": 100, "max_sample_tokens": 200}, 100),
    ],
)
def test_longest_sample_is_the_smallest_limit(limits: dict[str, int], longest: int) -> None:
    assert longest_sample(serve(**limits), LlamaConfig(**SMALL)) == longest


@pytest.mark.parametrize("field", ["max_model_len", "max_sample_tokens"])
def test_samples_longer_than_the_models_context_are_refused(field: str) -> None:
    with pytest.raises(FieldError, match="got 513; the model takes at most 512 tokens") as caught:
        longest_sample(serve(**{field: 513}), LlamaConfig(**SMALL))
    assert caught.value.field == field


# ---------------------------------------------------------------------------------------------------- installation


@pytest.fixture
def _without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, "teacher_server.engines.vllm.vllm_engine", raising=False)


@pytest.mark.usefixtures("_without_vllm")
def test_missing_vllm_error_names_the_package_to_install() -> None:
    async def start() -> None:
        await TeacherServer(serve()).serve()

    with pytest.raises(FieldError, match=r"needs vllm, not installed here: pip install 'kvdistill\[vllm\]'") as caught:
        asyncio.run(start())
    assert caught.value.field == "engine"


def test_another_missing_module_is_not_reported_as_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "teacher_server.engines.fake", None)
    with pytest.raises(ModuleNotFoundError, match="fake"):
        load_engine(ServeConfig(model="fake:", engine="fake"))


# ---------------------------------------------------------------------------------------------------- the self-test

Change = Callable[[LayerOutput], tuple[Tensor, Tensor]]


class ScrambledEngine(FakeEngine):
    """A FakeEngine whose keys and values are changed by `change`."""

    def __init__(self, change: Change, longest: int = 4096, failing: str = "") -> None:
        config = ServeConfig(model="fake:", engine="fake", max_sample_tokens=longest)
        super().__init__(config, FakeModel(layers=3, heads=2, dim=16))
        self._change, self._failing, self.lengths = change, failing, list[int]()

    def prefill(
        self, batch: Sequence[TokenizedSample], layers: Sequence[int], with_importance: bool, sink: LayerSink
    ) -> None:
        def changed(output: LayerOutput) -> None:
            sink(LayerOutput(output.layer, *self._change(output), None, None))

        self.lengths += [len(tokens.token_ids) for tokens in batch]
        super().prefill(batch, layers, with_importance, changed)

    def run(self, batch: Sequence[PlannedSample], emit: Emit, fail: Fail, wanted: Wanted) -> ExecutionTimings:
        if self._failing:
            fail(SampleFailure(0, self._failing))
            return ExecutionTimings(0.0, 0.0)
        return super().run(batch, emit, fail, wanted)


def unchanged(output: LayerOutput) -> tuple[Tensor, Tensor]:
    return output.k_BHTD, output.v_BHTD


def nearly(output: LayerOutput) -> tuple[Tensor, Tensor]:
    return output.k_BHTD * 1.00005, output.v_BHTD * 0.99995


def halves_swapped(output: LayerOutput) -> tuple[Tensor, Tensor]:
    return output.k_BHTD.roll(8, dims=-1), output.v_BHTD


def keys_and_values_swapped(output: LayerOutput) -> tuple[Tensor, Tensor]:
    return output.v_BHTD, output.k_BHTD


def one_block_moved(output: LayerOutput) -> tuple[Tensor, Tensor]:
    v_BHTD = output.v_BHTD.clone()
    v_BHTD[:, :, 128:144] = output.v_BHTD[:, :, 0:16]
    return output.k_BHTD, v_BHTD


def heads_swapped_in_the_second_layer(output: LayerOutput) -> tuple[Tensor, Tensor]:
    return output.k_BHTD.flip(1) if output.layer == 1 else output.k_BHTD, output.v_BHTD


def slightly_off(output: LayerOutput) -> tuple[Tensor, Tensor]:
    return output.k_BHTD * 1.0002, output.v_BHTD


@pytest.mark.parametrize("change", [unchanged, nearly])
def test_matching_keys_and_values_pass_the_self_test(change: Change) -> None:
    engine = ScrambledEngine(change)
    check_against(ScrambledEngine(unchanged), engine)
    assert engine.lengths == [TOKENS]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (halves_swapped, "the keys of layer 0"),
        (keys_and_values_swapped, "the keys of layer 0"),
        (one_block_moved, "the values of layer 0"),
        (heads_swapped_in_the_second_layer, "the keys of layer 1"),
        (slightly_off, "the keys of layer 0 in vLLM's cache differ from those of transformers by 0.0002 "),
    ],
)
def test_different_keys_or_values_fail_the_self_test(change: Change, what: str) -> None:
    with pytest.raises(UnsupportedModelError, match=what):
        check_against(ScrambledEngine(unchanged), ScrambledEngine(change))


def test_engine_without_results_fails_the_self_test() -> None:
    with pytest.raises(UnsupportedModelError, match="cache test failed: no memory"):
        check_against(ScrambledEngine(unchanged), ScrambledEngine(unchanged, failing="no memory"))


def test_self_test_respects_max_sample_tokens() -> None:
    engine = ScrambledEngine(unchanged, longest=20)
    check_against(ScrambledEngine(unchanged), engine)
    assert engine.lengths == [20]


def test_nan_keys_fail_the_self_test() -> None:
    def broken(output: LayerOutput) -> tuple[Tensor, Tensor]:
        return torch.full_like(output.k_BHTD, torch.nan), output.v_BHTD

    with pytest.raises(UnsupportedModelError, match=r"cache test failed: .*not finite"):
        check_against(ScrambledEngine(unchanged), ScrambledEngine(broken))
