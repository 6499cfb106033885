"""Tests of latents whose inputs are hidden states themselves: `student.projection: false`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvcore.errors import ConfigError, FieldError
from kvcore.models.files import CONFIG
from kvdistill import load_student
from student_trainer.model.latent import LatentStudent, load_reasoning, new_reasoning, save_reasoning
from tests.support.tiny_models import build_model, save_tiny_model, tiny_spec
from tests.support.training_parts import train_config

LATENTS, PASSES = 4, 3
SPEC = tiny_spec("llama", layers=2, seed=3)
PROMPTS = ["Question: 3+4?\nAnswer:", "7"]


def save_student(directory: Path, *, projects: bool) -> Path:
    save_tiny_model(directory, SPEC)
    reasoning = new_reasoning(build_model(SPEC), LATENTS, PASSES, seed=5, projects=projects)
    save_reasoning(reasoning, dict(reasoning.state_dict()), directory)
    return directory


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_student(tmp_path_factory.mktemp("plain"), projects=False)


@torch.no_grad()
def test_the_input_of_a_latent_is_the_state_one_position_before_it() -> None:
    lm = build_model(SPEC).double()
    student = LatentStudent(lm, new_reasoning(lm, LATENTS, PASSES, seed=5, projects=False).double()).eval()
    ids = torch.tensor([[7, 30, 41]])
    prompt_TE, latents_ME = lm.get_input_embeddings()(ids)[0], student.reasoning.first_inputs.weight
    for _ in range(PASSES):
        states_TE = lm.base_model(inputs_embeds=torch.cat([prompt_TE, latents_ME])[None]).last_hidden_state[0]
        latents_ME = states_TE[len(prompt_TE) - 1 : -1]
    found = student.think(student.read_prompt(ids, torch.ones_like(ids, dtype=torch.bool))).latents_BME[0]
    torch.testing.assert_close(found, latents_ME, rtol=1e-6, atol=1e-8)
    assert {name for name, _ in student.reasoning.named_parameters()} == {"first_inputs.weight"}


def test_a_saved_student_is_read_back_without_projection(plain: Path) -> None:
    assert json.loads((plain / CONFIG).read_text(encoding="utf-8"))["projection"] is False
    loaded = load_reasoning(build_model(SPEC), plain, LATENTS, PASSES, projects=False)
    assert loaded is not None
    assert not loaded.projects
    assert set(loaded.state_dict()) == {"first_inputs.weight"}


@pytest.mark.parametrize("projects", [True, False])
def test_transformers_gives_the_answers_of_load_student(
    projects: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    directory = save_student(tmp_path / "student", projects=projects)
    ours = load_student(directory, device="cpu")
    model: Any = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    batch = ours.tokenizer(PROMPTS[0], return_tensors="pt")
    tokens = model.generate(**batch, max_new_tokens=6, do_sample=False)[0, batch["input_ids"].shape[1] :]
    assert ours.tokenizer.decode(tokens, skip_special_tokens=True) == ours.generate(PROMPTS[0], 6)[0]
    (thoughts,) = ours.think(PROMPTS)[:1]
    (embeddings_TE,) = ours.prompt_embeddings(PROMPTS)[:1]
    assert embeddings_TE[-LATENTS:].equal(thoughts.latents_TME[-1])
    assert len(thoughts.latents_TME) == PASSES


def test_latents_depend_on_the_projection(plain: Path, tmp_path: Path) -> None:
    projected = save_student(tmp_path, projects=True)
    one, other = (load_student(folder, device="cpu").prompt_embeddings(PROMPTS[0])[0] for folder in (plain, projected))
    assert not one[-LATENTS:].allclose(other[-LATENTS:], atol=1e-3)


@pytest.mark.parametrize(("saved", "wanted"), [(True, False), (False, True)])
def test_the_other_value_than_saved_is_refused(saved: bool, wanted: bool, tmp_path: Path) -> None:
    directory = save_student(tmp_path, projects=saved)
    problem = (
        rf"student\.projection: .* trained with {str(saved).lower()}, the configuration says {str(wanted).lower()}"
    )
    with pytest.raises(ConfigError, match=problem):
        load_reasoning(build_model(SPEC), directory, LATENTS, PASSES, projects=wanted)


def test_a_folder_that_does_not_say_so_has_a_projection(tmp_path: Path) -> None:
    directory = save_student(tmp_path, projects=True)
    tree = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    del tree["projection"]
    (directory / CONFIG).write_text(json.dumps(tree), encoding="utf-8")
    loaded = load_reasoning(build_model(SPEC), directory, LATENTS, PASSES)
    assert loaded is not None
    assert loaded.projects
    assert load_student(directory, device="cpu").latents == LATENTS


def test_a_student_without_latents_needs_no_such_setting() -> None:
    with pytest.raises(FieldError, match=r"^student\.projection: false needs student\.mode 'latent'"):
        train_config("token", student={"projection": False})
