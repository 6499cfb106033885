"""The example in docs/examples: a latent student's answers inside vLLM equal those of `load_student`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from transformers import GenerationConfig

from kvdistill import Student, load_student
from student_trainer.model.latent import new_reasoning, save_reasoning
from student_trainer.model.pretrained import load_pretrained
from student_trainer.model.prompt_format import PLAIN
from tests.support.servers import REPOSITORY
from tests.vllm.conftest import save_model

PROMPTS = ["Question: What is 2+3?\nAnswer:", "Question: no?", "问题：四加五？\n答案："]
TOKENS = 12

_spec = importlib.util.spec_from_file_location("example", REPOSITORY / "docs" / "examples" / "vllm_prompt_embeds.py")
assert _spec is not None
assert _spec.loader is not None
example = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(example)


@pytest.fixture(params=["qwen2", "llama"])
def student(request: pytest.FixtureRequest, tmp_path: Path) -> Student:
    """A student with random latents, whose first answer ends at the fourth token."""
    directory = save_model(request.param, tmp_path)
    lm, _ = load_pretrained(str(directory), "auto", "path")
    reasoning = new_reasoning(lm, 3, 2, seed=5)
    save_reasoning(reasoning, reasoning.state_dict(), directory)
    loaded = load_student(directory, device="cpu")
    text = loaded.generate(PROMPTS[0], TOKENS)[0]
    fourth = loaded.tokenizer.encode(text, add_special_tokens=False)[3]
    GenerationConfig(eos_token_id=[2, fourth]).save_pretrained(directory)
    return load_student(directory, device="cpu")


def test_answers_in_vllm_equal_those_of_the_student(student: Student) -> None:
    answers = student.answer(PROMPTS, TOKENS)
    assert answers[0].finished
    assert not all(answer.finished for answer in answers)
    without_latents = Student(student.lm, student.tokenizer, None, PLAIN)
    assert without_latents.generate(PROMPTS, TOKENS) != [answer.text for answer in answers]
    # Without compilation, which takes minutes and needs a C++ compiler.
    assert example.answer(student, PROMPTS, TOKENS, enforce_eager=True) == [answer.text for answer in answers]
