"""Tests of the demo's tokenizers and models: their differences, and one token per reasoning value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.records import Record
from data.synthetic import ChainTask
from experiments.demo.demo_config import ModelName
from experiments.demo.make_models import make_model
from experiments.demo.tokenizers import build_tokenizer
from kvcore.tensors.projections import kv_projections

NAMES: tuple[ModelName, ...] = ("teacher_a", "teacher_b", "student")


def records() -> list[Record]:
    task = ChainTask()
    return [task.record(number) for number in range(0, task.questions, 400)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[ModelName, Path]:
    """The directory of each model, as the teacher server and the trainer load it."""
    root = tmp_path_factory.mktemp("models")
    for name in NAMES:
        make_model(name, build_tokenizer(name, records()), root / name)
    return {name: root / name for name in NAMES}


@pytest.fixture(scope="module")
def tokenizers(models: dict[ModelName, Path]) -> dict[ModelName, Any]:
    return {name: AutoTokenizer.from_pretrained(path) for name, path in models.items()}


def test_every_reasoning_value_is_one_token_in_each_tokenizer(
    tokenizers: dict[ModelName, Any],
) -> None:
    for tokenizer in tokenizers.values():
        for record in records()[:200]:
            encoded = tokenizer(record.text, return_offsets_mapping=True)
            pieces = [record.text[start:end] for start, end in encoded["offset_mapping"]]
            assert pieces[-4:] == [*(f" {value}" for value in record.reasoning.split()), record.answer]


def test_tokenizers_give_prompts_different_lengths_and_ids(tokenizers: dict[ModelName, Any]) -> None:
    ids = {name: tokenizer("3 +4 x2 -5 +1 =")["input_ids"] for name, tokenizer in tokenizers.items()}
    assert len({len(row) for row in ids.values()}) == 3
    values = {
        tuple(tokenizer.convert_tokens_to_ids(tokenizer.tokenize(" 0 1 2 3"))) for tokenizer in tokenizers.values()
    }
    assert len(values) == 3


def test_only_the_llama_teacher_adds_bos(tokenizers: dict[ModelName, Any]) -> None:
    for name, tokenizer in tokenizers.items():
        first = tokenizer("1 +1 =")["input_ids"][0]
        assert (first == tokenizer.bos_token_id) is (name == "teacher_b")
        assert tokenizer.eos_token_id is not None
        assert tokenizer.pad_token_id not in {None, tokenizer.eos_token_id}


def test_tokenizers_decode_any_text_exactly(tokenizers: dict[ModelName, Any]) -> None:
    text = "3 +4 = 44 ünïcode 你好 🙂\n\tend"
    for tokenizer in tokenizers.values():
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_tokenizer_training_is_deterministic() -> None:
    def definition(name: ModelName) -> str:
        tokenizer: Any = build_tokenizer(name, records())
        return tokenizer.backend_tokenizer.to_str()

    for name in NAMES:
        assert definition(name) == definition(name)


def test_models_differ_in_family_depth_heads_and_rope(models: dict[ModelName, Path]) -> None:
    loaded = {name: AutoModelForCausalLM.from_pretrained(path) for name, path in models.items()}
    for model in loaded.values():
        assert kv_projections(model)
    config = {name: model.config for name, model in loaded.items()}
    teachers = (config["teacher_a"], config["teacher_b"])
    for differing in ("model_type", "num_hidden_layers", "num_key_value_heads"):
        first, second = (getattr(teacher, differing) for teacher in teachers)
        assert first != second
    assert len({model.rope_parameters["rope_theta"] for model in config.values()}) == 3
    width = {
        name: projections[0].key.out_features
        for name, projections in ((name, kv_projections(model)) for name, model in loaded.items())
    }
    assert width == {"teacher_a": 32, "teacher_b": 32, "student": 16}


def test_same_seed_gives_same_weights(models: dict[ModelName, Path], tmp_path: Path) -> None:
    make_model("student", build_tokenizer("student", records()), tmp_path)
    again, first = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tmp_path, models["student"]))
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
