"""Tests of the saved best model: the trained tensors, and the special tokens that training taught."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Dots1Config,
    GenerationConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from kvcore.models.files import SINGLE
from student_trainer.config import TrainConfig
from student_trainer.loop import ds_engine
from student_trainer.loop.sample_order import SampleOrder
from student_trainer.loop.student_loading import load_student, with_latents
from student_trainer.loop.training_context import TrainingContext
from student_trainer.model.distill_model import DistillModel
from student_trainer.model.export import UnfaithfulModelError, check_written, save_model
from student_trainer.model.pretrained import set_special_tokens
from tests.support.file_modes import modes, umask
from tests.support.plain_engine import PlainEngine
from tests.support.tiny_models import build_tokenizer, save_tiny_model, tiny_spec
from tests.support.training_parts import RECORDS, collator, one_rank, train_config

EOS = 2
# What a validation found, for the model card.
RESULTS: dict[str, Any] = {}
SMALL: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts_per_tok": 2,
}


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ds_engine, "device", lambda: torch.device("cpu"))
    with one_rank():
        yield


def context_of(directory: Path, **student: Any) -> TrainingContext:
    config: TrainConfig = train_config("token", student={"path": str(directory), **student})
    lm, tokenizer = load_student(config.student, config.run.seed)
    set_special_tokens(lm, tokenizer)
    model = DistillModel(with_latents(lm, config), [], {}, config)
    order = SampleOrder(config.run, len(RECORDS), 0, 1)
    return TrainingContext(config, tokenizer, collator(), RECORDS, [], {}, model, order, None, {}, finished=False)


def saved(context: TrainingContext, directory: Path) -> Path:
    engine = PlainEngine(context.model, context.config, 1)
    save_model(engine, context, directory, RESULTS)
    return directory


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def test_the_saved_model_has_the_special_tokens_of_training_and_no_settings_of_sampling(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", tiny_spec("qwen2", layers=1, extra={"eos_token_id": [EOS, 7, 9]}))
    foreign = GenerationConfig(eos_token_id=[7, 9], do_sample=True, temperature=0.6, repetition_penalty=1.3)
    foreign.save_pretrained(base)
    best = saved(context_of(base), tmp_path / "best")
    config, generation = read(best / "config.json"), read(best / "generation_config.json")
    assert (config["eos_token_id"], config["pad_token_id"], config["bos_token_id"]) == (EOS, 0, 1)
    del generation["transformers_version"]
    generation.pop("_from_model_config", None)
    assert generation == {"eos_token_id": EOS, "pad_token_id": 0, "bos_token_id": 1}


def test_an_end_token_that_also_pads_keeps_its_gradient_in_the_next_stage(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", tiny_spec("qwen2", layers=1))
    tokenizer = build_tokenizer("qwen2")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(str(base))
    best = saved(context_of(base), tmp_path / "best")
    assert read(best / "config.json")["pad_token_id"] is None
    assert read(best / "generation_config.json")["pad_token_id"] == EOS
    lm: Any = AutoModelForCausalLM.from_pretrained(best)
    assert lm.get_input_embeddings().padding_idx is None


def test_all_files_have_the_mode_of_the_umask(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", tiny_spec("qwen2", layers=1))
    context = context_of(base, lora={"r": 2})
    with umask(0o007):
        found = modes(saved(context, tmp_path / "best"))
    assert {"model.safetensors", "adapter_model.safetensors", "config.json"} <= found.keys()
    assert set(found.values()) == {"660"}, found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_saved_model_has_the_trained_tensors(tmp_path: Path, dtype: str) -> None:
    base = save_tiny_model(tmp_path / "base", tiny_spec("qwen3", layers=2))
    context = context_of(base, dtype=dtype)
    best = saved(context, tmp_path / "best")
    lm = AutoModelForCausalLM.from_pretrained(best, dtype="auto")
    trained = context.model.student.lm.state_dict()
    assert all(tensor.equal(trained[name]) for name, tensor in lm.state_dict().items())


# Weights of the first have other names and shapes on disk than in memory; the second has a buffer that is saved.
EXPERTS: dict[str, PreTrainedConfig] = {
    "w1": MixtralConfig(**SMALL, num_local_experts=3),
    "e_score_correction_bias": Dots1Config(
        **SMALL, n_routed_experts=4, n_shared_experts=1, moe_intermediate_size=16, first_k_dense_replace=0
    ),
}


def mixture_of_experts(directory: Path, config: PreTrainedConfig) -> Path:
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config)
    for buffer in lm.buffers():
        buffer.add_(torch.rand_like(buffer))
    lm.save_pretrained(directory)
    build_tokenizer("mistral").save_pretrained(str(directory))
    return directory


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_saved_as_transformers_reads_them(tmp_path: Path, name: str, lora: bool) -> None:
    base = mixture_of_experts(tmp_path / "base", EXPERTS[name])
    assert any(name in stored for stored in load_file(base / SINGLE))
    settings = {"lora": {"r": 2, "alpha": 4, "target_modules": ["q_proj"]}} if lora else {}
    best = saved(context_of(base, **settings), tmp_path / "best")
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (base, best))
    assert all(tensor.equal(before[name]) for name, tensor in after.items())


def written(directory: Path) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    save_tiny_model(directory, tiny_spec("qwen3", layers=1))
    lm = AutoModelForCausalLM.from_pretrained(directory)
    torch.nn.init.ones_(lm.model.norm.weight)  # The same number in every data type.
    lm.save_pretrained(directory)
    return lm, dict(lm.state_dict())


def test_a_model_that_was_written_wrongly_is_refused(tmp_path: Path) -> None:
    lm, state = written(tmp_path)
    check_written(lm, state, tmp_path)
    name, file = "model.layers.0.mlp.up_proj.weight", tmp_path / SINGLE
    changed = {**state, name: state[name] + 1e-6}
    with pytest.raises(UnfaithfulModelError, match=f"{name} differs"):
        check_written(lm, changed, tmp_path)
    with pytest.raises(UnfaithfulModelError, match=r"model\.norm\.weight differs"):
        check_written(lm, {**state, "model.norm.weight": state["model.norm.weight"].bfloat16()}, tmp_path)
    with pytest.raises(UnfaithfulModelError, match="other was not written"):
        check_written(lm, {**state, "other": torch.zeros(1)}, tmp_path)
    save_file({key: tensor for key, tensor in state.items() if key != name}, file, metadata={"format": "pt"})
    with pytest.raises(UnfaithfulModelError, match=f"lacks 1 weights: {name}"):
        check_written(lm, state, tmp_path)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UnfaithfulModelError, match="damaged or cut off"):
        check_written(lm, state, tmp_path)


def test_an_earlier_best_model_survives_a_wrong_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_tiny_model(tmp_path / "base", tiny_spec("qwen3", layers=1))
    context = context_of(base)
    best = saved(context, tmp_path / "best")
    kept = (best / SINGLE).read_bytes()
    monkeypatch.setattr(type(context.model.student.lm), "save_pretrained", lambda *_, **__: None)
    with pytest.raises(UnfaithfulModelError):
        saved(context, best)
    assert (best / SINGLE).read_bytes() == kept
