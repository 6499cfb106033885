"""Tests of the check at load that keys and values do not depend on the batch, on real models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel

from kvcore.errors import UnsupportedModelError
from kvcore.models.attention_taps import ATTENTION_NAME
from teacher_server import app
from teacher_server.config import ServeConfig
from teacher_server.engines import load_engine
from teacher_server.engines.batch_check import NonFiniteLayerError, check_same
from teacher_server.engines.fake import FakeEngine, FakeFaults, FakeModel
from teacher_server.engines.hf.hf_engine import HFEngine
from teacher_server.self_test import SelfTestError, batch_test
from tests.support.tiny_models import FAMILIES, Family, build_tokenizer, randomise, save_tiny_model, tiny_spec


def gemma3(directory: Path, **options: Any) -> Path:
    config = Gemma3TextConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=384,
        max_position_embeddings=128,
        sliding_window=16,
        **options,
    )
    model = Gemma3ForCausalLM(config)
    randomise(model, seed=0)
    model.save_pretrained(directory)
    build_tokenizer("qwen2").save_pretrained(str(directory))
    return directory


def load(directory: Path, dtype: str = "fp32") -> HFEngine:
    config = ServeConfig.model_validate({"model": str(directory), "device": "cpu", "dtype": dtype})
    engine = app._load(load_engine, config)
    assert isinstance(engine, HFEngine)
    return engine


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_teacher_that_sees_rightwards_is_refused(dtype: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        load(gemma3(tmp_path, use_bidirectional_attention=True), dtype)
    message = caught.value.line()
    assert ": the keys of a short text in layer 1 change by " in message
    assert "beside a longer text, with padding on the right: its tokens see padding or the text after them" in message
    assert "\n" not in message
    assert "next: " in message


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_same_teacher_that_sees_only_leftwards_is_served(dtype: str, tmp_path: Path) -> None:
    assert load(gemma3(tmp_path), dtype).info.layers == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_every_supported_family_is_served(family: Family, tmp_path: Path) -> None:
    assert load(save_tiny_model(tmp_path, tiny_spec(family))).info.layers == 3


def without_mask(module: torch.nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**options, "attention_mask": None}


def without_positions(
    module: torch.nn.Module, args: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    return args, {**options, "position_ids": None}


@pytest.mark.parametrize(("forget", "refused"), [(without_mask, True), (without_positions, False)])
def test_a_generation_that_reads_its_padding_is_refused(
    forget: Callable[..., Any], refused: bool, tmp_path: Path
) -> None:
    directory = save_tiny_model(tmp_path, tiny_spec("qwen2"))
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, attn_implementation=ATTENTION_NAME).eval()
    model.base_model.register_forward_pre_hook(forget, with_kwargs=True)

    def build() -> HFEngine:
        return HFEngine(model, build_tokenizer("qwen2"), ServeConfig(model=str(directory)), "fp32", "digest")

    if refused:
        with pytest.raises(UnsupportedModelError, match="beside a longer text, with padding on the left"):
            build()
    else:
        # Rotary embeddings see only the distances of tokens, so shifted positions change nothing.
        build()


def test_a_model_without_head_is_not_tested_for_generation(tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path, tiny_spec("llama"))
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, attn_implementation=ATTENTION_NAME).eval()
    model.base_model.register_forward_pre_hook(without_mask, with_kwargs=True)
    model.generation_config = None  # pyright: ignore[reportAttributeAccessIssue]
    HFEngine(model, build_tokenizer("llama"), ServeConfig(model=str(directory)), "fp32", "digest")


def test_an_engine_that_fails_on_the_texts_is_refused() -> None:
    faults = FakeFaults(not_finite=frozenset({"self-test"}))
    engine = FakeEngine(ServeConfig(model="fake:layers=2", engine="fake"), FakeModel(layers=2), faults)
    with pytest.raises(SelfTestError, match=r"the self-test failed: .* not finite"):
        batch_test(engine)


def test_a_refused_engine_is_closed() -> None:
    closed: list[bool] = []

    class Closing(FakeEngine):
        def close(self) -> None:
            closed.append(True)

    faults = FakeFaults(not_finite=frozenset({"self-test"}))
    config = ServeConfig(model="fake:layers=2", engine="fake")
    with pytest.raises(SelfTestError):
        app._load(lambda _: Closing(config, FakeModel(layers=2), faults), config)
    assert closed == [True]


@pytest.mark.parametrize(("changed", "refused"), [(1, False), (2, True), (3, True)])
def test_one_token_of_three_may_differ(changed: int, refused: bool) -> None:
    info = FakeEngine(ServeConfig(model="fake:layers=1", engine="fake"), FakeModel(layers=1)).info
    kv_HTD = torch.ones(2, 3, 4)
    other_HTD = kv_HTD.clone()
    other_HTD[:, :changed] += 1.0
    if refused:
        with pytest.raises(
            UnsupportedModelError, match=r"the values of a short text in layer 0 change by 1 \(relative"
        ):
            check_same(info, {0: (kv_HTD, kv_HTD)}, {0: (kv_HTD, other_HTD)}, "right")
    else:
        check_same(info, {0: (kv_HTD, kv_HTD)}, {0: (kv_HTD, other_HTD)}, "right")


@pytest.mark.parametrize("weight", ["layers.1.self_attn.k_proj.weight", "layers.0.mlp.up_proj.weight"])
def test_a_weight_that_is_not_finite_is_reported_with_the_first_layer_that_it_reaches(
    weight: str, tmp_path: Path
) -> None:
    directory = save_tiny_model(tmp_path, tiny_spec("llama"))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.get_parameter(f"model.{weight}").data[3, 3] = torch.nan
    model.save_pretrained(directory)
    with pytest.raises(NonFiniteLayerError, match="keys or values of layer 1 are NaN or infinite"):
        load(directory)


def test_an_engine_whose_keys_are_not_finite_is_refused_by_the_layer() -> None:
    config = ServeConfig(model="fake:layers=2", engine="fake")
    engine = FakeEngine(config, FakeModel(layers=2), FakeFaults(not_finite=frozenset({"self-test"})))
    with pytest.raises((NonFiniteLayerError, SelfTestError), match="layer 0"):
        batch_test(engine)
