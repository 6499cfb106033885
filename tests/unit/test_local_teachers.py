"""Tests of the names and devices of teachers on this machine."""

from __future__ import annotations

import pytest

from kvcore.errors import ConfigError, FieldError
from student_trainer.config import TeacherConfig
from student_trainer.launching import local_teachers
from student_trainer.launching.endpoints import teacher_names
from student_trainer.launching.local_teachers import _devices
from student_trainer.launching.teacher_servers import as_arguments


def test_teacher_name_is_last_part_of_path_or_hub_id() -> None:
    models = ["Qwen/Qwen2.5-7B", "/models/llama 3/", "plain"]
    assert teacher_names(models) == {"Qwen2.5-7B": models[0], "llama_3": models[1], "plain": models[2]}


def test_models_with_equal_names_get_unique_numbers() -> None:
    models = ["a/m", "b/m.2", "c/m", "d/m"]
    assert teacher_names(models) == {"m": "a/m", "m.2": "b/m.2", "m.3": "c/m", "m.4": "d/m"}


def test_teacher_names_are_valid_in_the_configuration() -> None:
    for name in teacher_names(["模型/通义", "x/.hidden", "y/" + "long" * 40, "z/a b:c"]):
        assert TeacherConfig(name=name).name == name


@pytest.mark.parametrize("models", [["a/m", "a/m"], ["/"], [""]])
def test_duplicate_or_nameless_model_raises(models: list[str]) -> None:
    with pytest.raises(FieldError, match="teacher_models"):
        teacher_names(models)


def test_empty_list_of_models_raises() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        teacher_names([])


def test_models_are_assigned_to_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_teachers, "_gpus", lambda: 2)
    assert _devices("cuda", 3) == ["cuda:0", "cuda:1", "cuda:0"]
    assert _devices("auto", 2) == ["cuda:0", "cuda:1"]
    assert _devices("cuda:1", 2) == ["cuda:1", "cuda:1"]
    assert _devices("cpu", 2) == ["cpu", "cpu"]
    monkeypatch.setattr(local_teachers, "_gpus", lambda: 0)
    assert _devices("auto", 2) == ["auto", "auto"]


def test_as_arguments_omits_unset_flags() -> None:
    flags = {"dtype": "fp32", "load_in_8bit": True, "trust_remote_code": False, "revision": None, "threads": 2}
    assert as_arguments(flags) == ["--dtype", "fp32", "--load-in-8bit", "--threads", "2"]
