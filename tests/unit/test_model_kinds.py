"""Tests of the refusal of models that cannot be teachers: what was found, what is supported, and the next step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from kvcore.errors import FieldError, KVDistillError, UnsupportedModelError
from teacher_server.config import ServeConfig
from teacher_server.engines import load_engine
from tests.support.tiny_models import build_tokenizer, save_tiny_model, tiny_spec

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 384,
}
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
T5_SIZES: dict[str, Any] = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 384}
IMAGE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
SPEECH: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "vocab_size": 384,
    **SPECIAL,
    "decoder_start_token_id": 1,
}
MLA: dict[str, Any] = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
}
HYBRID: dict[str, Any] = {
    **SIZES,
    "num_hidden_layers": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}

ENCODER = "is an encoder, whose tokens also see the text after them"
TWO_STACKS = "is an encoder-decoder model"
WITH_MEDIA = "is a model of text and images or sound, not of text alone"
FUSED = "has one projection for queries, keys and values"
NO_KEYS = "is a state-space or linear-attention layer, which has no keys and values per token"
OWN_ATTENTION = "computes attention in another way than scaled_dot_product_attention"


def bert() -> hf.PreTrainedModel:
    return hf.BertForMaskedLM(hf.BertConfig(**SIZES))


def modern_bert() -> hf.PreTrainedModel:
    return hf.ModernBertForMaskedLM(hf.ModernBertConfig(**SIZES, **SPECIAL, cls_token_id=1, sep_token_id=2))


def t5() -> hf.PreTrainedModel:
    return hf.T5ForConditionalGeneration(hf.T5Config(**T5_SIZES))


def whisper() -> hf.PreTrainedModel:
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**SPEECH))


def gemma3_with_images() -> hf.PreTrainedModel:
    text = {**SIZES, "num_key_value_heads": 1, "head_dim": 16}
    return hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(text_config=text, vision_config=dict(IMAGE), mm_tokens_per_image=4)
    )


def llava() -> hf.PreTrainedModel:
    text = {**SIZES, "model_type": "llama"}
    vision = {**IMAGE, "model_type": "clip_vision_model"}
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(text_config=text, vision_config=vision))


def image_classifier() -> hf.PreTrainedModel:
    return hf.ViTModel(hf.ViTConfig(**IMAGE))


def mamba() -> hf.PreTrainedModel:
    return hf.MambaForCausalLM(hf.MambaConfig(hidden_size=32, state_size=8, num_hidden_layers=2, vocab_size=384))


def qwen3_next() -> hf.PreTrainedModel:
    return hf.Qwen3NextForCausalLM(hf.Qwen3NextConfig(**HYBRID))


def deepseek_v3() -> hf.PreTrainedModel:
    return hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**SIZES, num_key_value_heads=2, **MLA))


def gpt2() -> hf.PreTrainedModel:
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=384))


def gpt_neox() -> hf.PreTrainedModel:
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SIZES))


def phi3() -> hf.PreTrainedModel:
    return hf.Phi3ForCausalLM(hf.Phi3Config(**SIZES, **SPECIAL))


def falcon() -> hf.PreTrainedModel:
    return hf.FalconForCausalLM(
        hf.FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=384)
    )


def gpt_j() -> hf.PreTrainedModel:
    return hf.GPTJForCausalLM(hf.GPTJConfig(n_embd=32, n_layer=2, n_head=2, vocab_size=384, rotary_dim=8))


def refusal(directory: Path) -> KVDistillError:
    """The error of serving a directory; its line is what the command prints."""
    with pytest.raises(KVDistillError) as caught:
        load_engine(ServeConfig(model=str(directory), device="cpu"))
    line = caught.value.line()
    assert "\n" not in line
    assert line.count("next: ") == 1
    return caught.value


@pytest.mark.parametrize(
    ("build", "found"),
    [
        (bert, ENCODER),
        (modern_bert, ENCODER),
        (t5, TWO_STACKS),
        (whisper, TWO_STACKS),
        (gemma3_with_images, WITH_MEDIA),
        (llava, WITH_MEDIA),
        (image_classifier, "is no language model (model_type vit)"),
        (mamba, f"k_proj and v_proj in 0 of 2 layers; MambaMixer {NO_KEYS}"),
        (qwen3_next, f"k_proj and v_proj in 1 of 4 layers; Qwen3NextGatedDeltaNet {NO_KEYS}"),
        (deepseek_v3, "k_proj and v_proj in 0 of 2 layers; DeepseekV3Attention is multi-head latent attention"),
        (gpt2, f"k_proj and v_proj in 0 of 2 layers; GPT2Attention {FUSED}"),
        (gpt_neox, f"GPTNeoXAttention {FUSED}"),
        (phi3, f"Phi3Attention {FUSED}"),
        (falcon, f"FalconAttention {FUSED}"),
        (gpt_j, f"GPTJForCausalLM {OWN_ATTENTION}"),
    ],
)
def test_a_model_of_another_kind_is_refused_by_what_it_is(
    build: Callable[[], hf.PreTrainedModel], found: str, tmp_path: Path
) -> None:
    build().save_pretrained(tmp_path)
    build_tokenizer("qwen2").save_pretrained(str(tmp_path))
    error = refusal(tmp_path)
    assert isinstance(error, UnsupportedModelError)
    assert found in str(error)
    assert "kvdistill supports decoder-only language models with standard attention" in str(error)


def test_the_kind_is_checked_before_tokenizer_and_weights(tmp_path: Path) -> None:
    hf.GPT2Config(n_embd=1600, n_layer=48, n_head=25).save_pretrained(tmp_path)
    assert "k_proj and v_proj in 0 of 48 layers" in str(refusal(tmp_path))


def test_a_decoder_that_shares_its_class_with_an_encoder_is_described_by_its_attention(tmp_path: Path) -> None:
    hf.BertLMHeadModel(hf.BertConfig(**SIZES, is_decoder=True)).save_pretrained(tmp_path)
    assert "BertSelfAttention has query, key, value" in str(refusal(tmp_path))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model", tiny_spec("llama", layers=2))


def without_model_type(directory: Path) -> None:
    change_config(directory, model_type=None)


def with_unknown_model_type(directory: Path) -> None:
    change_config(directory, model_type="lama")


def with_cut_config(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": ', encoding="utf-8")


def with_list_as_config(directory: Path) -> None:
    (directory / "config.json").write_text("[]", encoding="utf-8")


def change_config(directory: Path, **changes: object) -> None:
    file = directory / "config.json"
    tree = {**json.loads(file.read_text(encoding="utf-8")), **changes}
    file.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (without_model_type, "has no model_type, which says how to build the model"),
        (with_unknown_model_type, "has the model_type 'lama', which transformers"),
        (with_cut_config, "config.json is not valid JSON"),
        (with_list_as_config, "config.json holds a list, not a JSON object"),
    ],
)
def test_an_unusable_configuration_is_refused_by_what_is_wrong_in_it(
    damage: Callable[[Path], None], found: str, tiny: Path
) -> None:
    damage(tiny)
    error = refusal(tiny)
    assert isinstance(error, FieldError)
    assert error.field == "model"
    assert found in str(error)


def test_an_unknown_model_type_suggests_the_nearest_one(tiny: Path) -> None:
    with_unknown_model_type(tiny)
    assert str(refusal(tiny)).endswith("did you mean 'llama'?")


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ((), "it has no files"),
        (("train.jsonl",), "it has train.jsonl"),
        (tuple("abcdefg"), "it has a, b, c, d, e, ..."),
    ],
)
def test_a_directory_without_configuration_is_refused_by_what_it_holds(
    files: tuple[str, ...], found: str, tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / name).touch()
    assert f"has no config.json, so it is not a transformers model; {found}; next: " in str(refusal(tmp_path))


def test_a_model_with_code_of_its_own_is_left_to_its_code(tiny: Path) -> None:
    change_config(tiny, auto_map={"AutoConfig": "code.Config"}, model_type="unknown")
    with pytest.raises(KVDistillError) as caught:
        load_engine(ServeConfig(model=str(tiny), device="cpu"))
    assert "has the model_type" not in str(caught.value)


def test_a_checked_model_takes_no_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[torch.device] = []
    initialise = torch.nn.Linear.__init__

    def record(self: torch.nn.Linear, *arguments: Any, **options: Any) -> None:
        initialise(self, *arguments, **options)
        made.append(self.weight.device)

    monkeypatch.setattr(torch.nn.Linear, "__init__", record)
    hf.GPTNeoXConfig(**SIZES).save_pretrained(tmp_path)
    refusal(tmp_path)
    assert {device.type for device in made} == {"meta"}
