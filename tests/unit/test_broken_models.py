"""Tests that training, evaluation, generation and serving refuse the same broken directories, in one line."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import T5Config

from evaluation.models import load_model
from kvcore.errors import FieldError, KVDistillError
from kvcore.models.files import CONFIG, SINGLE
from kvdistill import load_student
from student_trainer.model.pretrained import load_pretrained
from teacher_server.config import ServeConfig
from teacher_server.engines import load_engine
from tests.support.tiny_models import build_model, build_tokenizer, save_tiny_model, tiny_spec

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 987654\n"


def serve(path: str) -> object:
    return load_engine(ServeConfig.model_validate({"model": path, "device": "cpu"}))


# Each loader, and the field that it names.
LOADERS: dict[str, tuple[Callable[[str], object], str]] = {
    "train": (lambda path: load_pretrained(path, "fp32", "student.path", trained=True), "student.path"),
    "eval": (lambda path: load_model(path, "auto", "cpu", 1), "--model_path"),
    "generate": (lambda path: load_student(path, device="cpu"), "path"),
    "serve": (serve, "model"),
}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model", tiny_spec("qwen2", layers=2))


@pytest.fixture(autouse=True)
def no_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))


def change_json(file: Path, **changes: object) -> None:
    tree = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(tree | changes), encoding="utf-8")


def change_weights(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(directory / SINGLE)
    change(tensors)
    save_file(tensors, directory / SINGLE, metadata={"format": "pt"})


def weights_are_a_pointer(directory: Path) -> None:
    (directory / SINGLE).write_text(POINTER, encoding="utf-8")


def tokenizer_is_a_pointer(directory: Path) -> None:
    (directory / "tokenizer.json").write_text(POINTER, encoding="utf-8")


def cut_off(directory: Path) -> None:
    file = directory / SINGLE
    file.write_bytes(file.read_bytes()[:-100])


def empty(directory: Path) -> None:
    (directory / SINGLE).write_bytes(b"")


def other_format(directory: Path) -> None:
    (directory / SINGLE).rename(directory / "pytorch_model.bin")


def larger_vocabulary(directory: Path) -> None:
    tokenizer = build_tokenizer("qwen2")
    tokenizer.add_tokens([f"<new{index}>" for index in range(100)])
    tokenizer.save_pretrained(str(directory))


def pad_beyond_the_embedding(directory: Path) -> None:
    tokenizer = build_tokenizer("qwen2")
    tokenizer.add_tokens([f"<new{index}>" for index in range(384 - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(str(directory))


def no_tokenizer(directory: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()


def lora_folder(directory: Path) -> None:
    for file in directory.iterdir():
        if not file.name.startswith("tokenizer"):
            file.unlink()
    lora = LoraConfig(target_modules=["q_proj"])
    get_peft_model(build_model(tiny_spec("qwen2", layers=2)), lora).save_pretrained(str(directory))
    change_json(directory / "adapter_config.json", base_model_name_or_path="some/base")


def adapter_beside_the_model(directory: Path) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": "some/base"}
    (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def custom_model(directory: Path) -> None:
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    change_json(directory / CONFIG, model_type="own", auto_map=auto_map)
    (directory / "modeling_own.py").write_text("raise SystemExit('this code ran')", encoding="utf-8")


def lacks_a_weight(directory: Path) -> None:
    change_weights(directory, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.weight"))


def has_a_foreign_weight(directory: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    change_weights(directory, lambda tensors: tensors.update({f"{name}_scale_inv": tensors[name][:1].clone()}))


def garbled_config(directory: Path) -> None:
    (directory / CONFIG).write_text('{"model_type": ', encoding="utf-8")


def encoder_and_decoder(directory: Path) -> None:
    T5Config(d_model=8).save_pretrained(directory)


BROKEN: dict[Callable[[Path], None], str] = {
    weights_are_a_pointer: r"model\.safetensors is a Git LFS pointer.*; run 'git lfs pull' in ",
    tokenizer_is_a_pointer: r"tokenizer\.json is a Git LFS pointer.*; run 'git lfs pull' in ",
    cut_off: r"model\.safetensors is damaged or cut off \(.*\); copy or download it again",
    empty: r"model\.safetensors is damaged or cut off \(.*\); copy or download it again",
    other_format: r"model\.safetensors is missing; .*: convert pytorch_model\.bin with save_pretrained",
    larger_vocabulary: r"has token ids up to 4\d\d \('<new99>'\), but the model's embedding has 384 rows; give the",
    pad_beyond_the_embedding: r"has token ids up to 384 \('\[PAD\]'\), but the model's embedding has 384 rows; give",
    no_tokenizer: r"has no tokenizer: none of tokenizer\.json, .*; copy these files from the model",
    lora_folder: r"holds an adapter \(LoRA\) of 'some/base', not a whole model; merge it with PeftModel",
    adapter_beside_the_model: r"holds an adapter \(LoRA\) of 'some/base', not a whole model; merge it with PeftModel",
    custom_model: r"the configuration of .* needs Python code that comes with it; .*trust.remote.code",
    lacks_a_weight: r"lacks 1 weights: model\.layers\.1\.self_attn\.k_proj\.weight, \.\.\.; copy or download",
    has_a_foreign_weight: r"has 1 weights that Qwen2ForCausalLM does not have: model.*_scale_inv, \.\.\.; copy or",
    garbled_config: r"config\.json is not valid JSON .*; next: copy or download it again",
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__)
def test_a_broken_directory_is_refused_in_one_line_with_the_next_step(
    tiny: Path, damage: Callable[[Path], None], loader: str
) -> None:
    damage(tiny)
    load, field = LOADERS[loader]
    with pytest.raises(FieldError, match=BROKEN[damage]) as caught:
        load(str(tiny))
    assert caught.value.field == field
    assert "\n" not in str(caught.value)
    if damage is custom_model:
        assert ("--trust-remote-code" in str(caught.value)) == (loader == "serve")


@pytest.mark.parametrize("loader", LOADERS)
def test_an_encoder_decoder_is_refused(tiny: Path, loader: str) -> None:
    encoder_and_decoder(tiny)
    with pytest.raises(KVDistillError, match="it is an encoder-decoder model"):
        LOADERS[loader][0](str(tiny))


@pytest.mark.parametrize("loader", LOADERS)
def test_a_whole_directory_is_loaded(tiny: Path, loader: str) -> None:
    assert LOADERS[loader][0](str(tiny)) is not None


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "bitsandbytes", "gguf"])
def test_a_quantised_student_is_refused_by_name(tiny: Path, method: str) -> None:
    change_json(tiny / CONFIG, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(FieldError, match=rf"^student\.path: .* is quantised \({method}\).*; give the original model"):
        load_pretrained(str(tiny), "fp32", "student.path", trained=True)


def test_a_special_token_without_embedding_is_only_warned_about(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = build_tokenizer("qwen2")
    tokenizer.add_tokens([f"<new{index}>" for index in range(384 - len(tokenizer))])
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(str(tiny))
    with caplog.at_level(logging.WARNING):
        load_pretrained(str(tiny), "fp32", "student.path", trained=True)
    assert "texts must not contain ['<image>']" in caplog.text


def test_a_tied_head_and_old_rotary_buffers_are_accepted(tmp_path: Path) -> None:
    spec = tiny_spec("llama", layers=2, extra={"tie_word_embeddings": True})
    directory = save_tiny_model(tmp_path / "model", spec)
    assert "lm_head.weight" not in load_file(directory / SINGLE)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_weights(directory, lambda tensors: tensors.update({name: tensors["model.norm.weight"][:8].clone()}))
    lm, _ = load_pretrained(str(directory), "fp32", "student.path", trained=True)
    head: Any = lm.get_output_embeddings()
    assert head.weight is lm.get_input_embeddings().weight
