"""Tests of the models and options that the Hugging Face engine accepts or refuses."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    HunYuanDenseV1Config,
    PreTrainedConfig,
)

from kvcore.errors import FieldError, UnsupportedModelError
from kvcore.models import files
from kvcore.models.attention_taps import ATTENTION_NAME
from teacher_server.config import ServeConfig
from teacher_server.engines import load_engine, weights
from teacher_server.engines.hf.hf_engine import HFEngine
from tests.support.tiny_models import build_tokenizer, save_tiny_model, tiny_spec

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "vocab_size": 384,
    "head_dim": 16,
}
HEADS: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model", tiny_spec("qwen2", layers=2))


def serve(directory: Path, **options: object) -> ServeConfig:
    return ServeConfig.model_validate({"model": str(directory), "device": "cpu", **options})


def save(config: PreTrainedConfig, directory: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    build_tokenizer("qwen2").save_pretrained(str(directory))
    return directory


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=384), "k_proj"),
        (Gemma2Config(**SMALL, **HEADS, attn_logit_softcapping=50.0), "scaled_dot_product_attention"),
        (HunYuanDenseV1Config(**SMALL, **HEADS), "may norm its keys after the rotary embedding"),
        (GptOssConfig(**SMALL, **HEADS, num_local_experts=2, num_experts_per_tok=1), "scaled_dot_product_attention"),
    ],
    ids=["fused projections", "capped scores", "norm after the rotary embedding", "attention sinks"],
)
def test_models_with_inexact_kv_or_attention_are_refused(config: PreTrainedConfig, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        load_engine(serve(save(config, tmp_path)))


def test_attention_with_unsupported_arguments_is_refused(tiny: Path) -> None:
    def add_sinks(module: torch.nn.Module, args: object, kwargs: dict[str, object]) -> tuple[object, dict[str, object]]:
        return args, {**kwargs, "s_aux": torch.zeros(4)}

    model = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation=ATTENTION_NAME)
    model.model.layers[1].self_attn.register_forward_pre_hook(add_sinks, with_kwargs=True)
    with pytest.raises(UnsupportedModelError, match="layer 1 attends with s_aux"):
        HFEngine(model, build_tokenizer("qwen2"), serve(tiny), "fp32", "digest")


def without_tensor(directory: Path) -> None:
    file = directory / files.SINGLE
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})


def truncated(directory: Path) -> None:
    file = directory / files.SINGLE
    file.write_bytes(file.read_bytes()[:-100])


def without_weights(directory: Path) -> None:
    (directory / files.SINGLE).unlink()


def without_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def without_tokenizer(directory: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()


def garbled_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").write_text('{"model": ', encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (without_tensor, "lacks 1 weights: model.layers.1.self_attn.k_proj.weight"),
        (truncated, "model.safetensors is damaged or cut off"),
        (without_weights, "model.safetensors is missing"),
        (without_config, "has no config.json, so it is not a transformers model; it has generation_config.json, "),
        (without_tokenizer, "has no tokenizer"),
        (garbled_tokenizer, "tokenizer of .* cannot be loaded"),
    ],
)
def test_a_damaged_checkpoint_is_refused(tiny: Path, damage: Callable[[Path], None], reason: str) -> None:
    damage(tiny)
    with pytest.raises(FieldError, match=reason) as caught:
        load_engine(serve(tiny))
    assert caught.value.field == "model"


@pytest.mark.parametrize(
    ("options", "field", "reason"),
    [
        ({"load_in_8bit": True}, "load_in_8bit", "needs a GPU"),
        ({"load_in_4bit": True}, "load_in_4bit", "needs a GPU"),
        ({"device": "cuda:7"}, "device", "cuda:7"),
        ({"max_sample_tokens": 513}, "max_sample_tokens", "got 513; the model takes at most 512"),
        ({"revision": "main"}, "revision", "no revisions"),
        ({"model": "no-such-directory-or-model"}, "model", "is not a directory"),
        ({"model": "fake:layers=0", "engine": "fake"}, "model", "too small"),
        ({"model": "fake:depth=3", "engine": "fake"}, "model", "known: layers, heads, dim, delay_ms"),
        ({"model": "fake:layers=three", "engine": "fake"}, "model", "is not a number"),
    ],
)
def test_unavailable_options_are_refused(tiny: Path, options: dict[str, object], field: str, reason: str) -> None:
    with pytest.raises(FieldError, match=reason) as caught:
        load_engine(serve(tiny, **options))
    assert caught.value.field == field


def test_max_sample_tokens_defaults_to_the_models_context(tiny: Path) -> None:
    assert load_engine(serve(tiny)).info.max_sample_tokens == 512
    assert load_engine(serve(tiny, max_sample_tokens=100)).info.max_sample_tokens == 100


def test_dtype_is_part_of_the_teacher_identity(tiny: Path) -> None:
    full, half = load_engine(serve(tiny)).info, load_engine(serve(tiny, dtype="bf16")).info
    assert (full.dtype, half.dtype) == ("fp32", "bf16")
    assert not full.same_teacher(half)


def test_the_digest_depends_only_on_weights_and_configuration(tiny: Path, tmp_path: Path) -> None:
    def digest(directory: Path) -> str:
        return load_engine(serve(directory, name="any")).info.weights_digest

    first = digest(tiny)
    moved = tiny.rename(tmp_path / "elsewhere")
    assert digest(moved) == first
    config = json.loads((moved / "config.json").read_text(encoding="utf-8"))
    (moved / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}), encoding="utf-8")
    assert digest(moved) != first
    (moved / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert digest(moved) == first
    tensors = load_file(moved / files.SINGLE)
    tensors["model.norm.weight"][0] += 1.0
    save_file(tensors, moved / files.SINGLE, metadata={"format": "pt"})
    assert digest(moved) != first


def test_the_digest_covers_all_shards(tmp_path: Path) -> None:
    names = ["a.safetensors", "b.safetensors"]
    (tmp_path / files.INDEX).write_text(json.dumps({"weight_map": dict(enumerate(names))}), encoding="utf-8")
    for name in names:
        save_file({"x": torch.zeros(2)}, tmp_path / name)
    first = weights.weights_digest(tmp_path, {}, "fp32")
    save_file({"x": torch.ones(2)}, tmp_path / names[1])
    assert weights.weights_digest(tmp_path, {}, "fp32") != first
    (tmp_path / names[1]).unlink()
    with pytest.raises(FieldError, match=r"b\.safetensors is missing"):
        weights.weights_digest(tmp_path, {}, "fp32")


def test_the_digest_of_a_large_file_is_cached_until_it_changes(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "CACHE_FROM_BYTES", 0)
    file = tiny / files.SINGLE
    first = weights.weights_digest(tiny, {}, "fp32")
    monkeypatch.setattr(weights, "_hash", lambda _: pytest.fail("hashed again"))
    assert weights.weights_digest(tiny, {}, "fp32") == first
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(1, 1))
    assert weights.weights_digest(tiny, {}, "fp32") != first
