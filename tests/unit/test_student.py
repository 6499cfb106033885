"""`kvdistill.load_student`: the same answers as in evaluation, one by one and in batches."""

from __future__ import annotations

from pathlib import Path

import pytest
from lm_eval.api.instance import Instance

from evaluation.models import load_model
from kvcore.errors import FieldError
from kvdistill import Student, load_student
from student_trainer.model.latent import LATENT_CONFIG, new_reasoning, save_reasoning
from student_trainer.model.pretrained import load_pretrained
from tests.support.tiny_models import save_tiny_model, tiny_spec

PROMPTS = ["Question: What is 2+3?\nAnswer:", "Question: no?\nAnswer:", "问题：四加五？\n答案："]
TOKENS = 6


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("plain"), tiny_spec("llama", layers=2, seed=3))


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights, with latents."""
    directory = save_tiny_model(tmp_path_factory.mktemp("latent"), tiny_spec("llama", layers=2, seed=3))
    lm, _ = load_pretrained(str(directory), "auto", "path")
    reasoning = new_reasoning(lm, 3, 2, seed=5)
    save_reasoning(reasoning, reasoning.state_dict(), directory)
    return directory


def evaluated(directory: Path) -> list[str]:
    """The answers that `kvdistill eval` scores."""
    settings = {"until": [], "do_sample": False, "max_gen_toks": TOKENS}
    requests = [Instance("generate_until", {}, (prompt, settings), 0, metadata=("task", 0, 1)) for prompt in PROMPTS]
    return load_model(str(directory), "fp32", "cpu", 2).generate_until(requests, disable_tqdm=True)


def student(directory: Path) -> Student:
    return load_student(directory, device="cpu")


@pytest.mark.parametrize(("kind", "latents"), [("plain", 0), ("latent", 3)])
def test_answers_are_those_that_evaluation_scores(kind: str, latents: int, request: pytest.FixtureRequest) -> None:
    directory: Path = request.getfixturevalue(kind)
    loaded = student(directory)
    assert loaded.latents == latents
    assert loaded.generate(PROMPTS, TOKENS) == evaluated(directory)


def test_latents_change_the_answers(plain: Path, latent: Path) -> None:
    assert student(plain).generate(PROMPTS, TOKENS) != student(latent).generate(PROMPTS, TOKENS)


@pytest.mark.parametrize("kind", ["plain", "latent"])
def test_answers_do_not_depend_on_the_batch_size(kind: str, request: pytest.FixtureRequest) -> None:
    loaded = student(request.getfixturevalue(kind))
    alone = [loaded.generate(prompt, TOKENS)[0] for prompt in PROMPTS]
    assert loaded.generate(PROMPTS, TOKENS, batch_size=2) == alone
    assert loaded.generate([]) == []


def test_an_answer_ends_at_the_end_of_sequence(plain: Path) -> None:
    loaded = student(plain)
    (whole,) = loaded.generate(PROMPTS[0], TOKENS)
    third = loaded.tokenizer.encode(whole, add_special_tokens=False)[2]
    config = loaded.lm.generation_config
    assert config is not None
    config.eos_token_id = third
    loaded.tokenizer.eos_token = loaded.tokenizer.convert_ids_to_tokens(third)
    (cut,) = loaded.generate(PROMPTS[0], TOKENS)
    assert whole.startswith(cut)
    assert len(cut) < len(whole)


def test_invalid_models_and_arguments_are_refused(plain: Path, latent: Path, tmp_path: Path) -> None:
    with pytest.raises(FieldError, match=r"^path: cannot load"):
        load_student(tmp_path)
    loaded = student(plain)
    with pytest.raises(FieldError, match=r"^prompts\.1: expected a text"):
        loaded.generate(["a", ""])
    with pytest.raises(FieldError, match=r"^max_new_tokens: expected at least 1; got 0"):
        loaded.generate(PROMPTS, 0)
    (latent / LATENT_CONFIG).rename(tmp_path / LATENT_CONFIG)
    with pytest.raises(FieldError, match=rf"^path: .* {LATENT_CONFIG} is missing"):
        load_student(latent)
