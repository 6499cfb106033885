"""What a training configuration refuses before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from kvcore.config import parse
from kvcore.errors import ConfigError
from student_trainer.config import TrainConfig


def tree(**sections: Any) -> dict[str, Any]:
    return {
        "student": {"path": "student", "mode": "token"},
        "teachers": [{"name": "ada", "endpoints": ["localhost:50051"]}],
        "kv": {"selection": {"selector": "full"}},
        "data": {"train": "train.jsonl"},
        "run": {"output_dir": "out", "steps": 1},
    } | sections


@pytest.mark.parametrize("name", ["..", ".", ".hidden", "a/b", "", "x" * 65])
def test_a_teachers_name_that_would_leave_the_stores_folder_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="name"):
        parse(tree(teachers=[{"name": name, "endpoints": ["localhost:50051"]}]), TrainConfig)


@pytest.mark.parametrize("name", ["ada", "qwen2.5-7b", "_x", "0", "x" * 64])
def test_ordinary_names_are_taken(name: str) -> None:
    assert parse(tree(teachers=[{"name": name, "endpoints": ["h:1"]}]), TrainConfig).teachers[0].name == name


@pytest.mark.parametrize("scope", ["head", "layer"])
def test_token_mode_refuses_scopes_whose_slots_hold_different_tokens(scope: str) -> None:
    with pytest.raises(ConfigError, match=f"token mode.*got '{scope}'"):
        parse(tree(kv={"selection": {"selector": "full", "scope": scope}}), TrainConfig)


@pytest.mark.parametrize("selection", [{"selector": "full"}, {"selector": "right", "budget": 4}])
def test_latent_mode_needs_as_many_slots_as_latents(selection: dict[str, Any]) -> None:
    student = {"path": "student", "mode": "latent", "latents": 3}
    with pytest.raises(ConfigError, match="3 latents"):
        parse(tree(student=student, kv={"selection": selection}), TrainConfig)
