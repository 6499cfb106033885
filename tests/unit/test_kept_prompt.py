"""Tests of the kept prompt: keeping its K/V changes neither results nor gradients, compared with reading it again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2Model, PreTrainedModel

from benchmarks.whole_readings import answer_reading
from kvcore.types import Tensor
from student_trainer.model.latent import LatentStudent, new_reasoning
from tests.support.rotary_models import HEAD_DIM, MODELS, tiny
from tests.support.tiny_models import build_model, tiny_spec

# Most texts are longer than the sliding window.
SLIDING: dict[str, Callable[[], PreTrainedModel]] = {
    "gemma2-window-of-4": lambda: tiny(Gemma2Model, Gemma2Config, head_dim=HEAD_DIM, sliding_window=4),
    "mistral-window": lambda: build_model(tiny_spec("mistral")),
}
ARCHITECTURES = MODELS | SLIDING
PROMPT_BP = torch.tensor([[0, 0, 0, 5, 9, 31, 7], [12, 3, 44, 20, 3, 4, 50], [0, 0, 0, 0, 0, 0, 8]])
PROMPT_MASK_BP = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7, [0] * 6 + [1]]).bool()
ANSWER_BA = torch.tensor([[7, 30, 2, 0], [11, 6, 17, 2], [2, 0, 0, 0]])
ANSWER_MASK_BA = torch.tensor([[1, 1, 1, 0], [1] * 4, [1, 0, 0, 0]]).bool()
PROMPTS = (PROMPT_BP, PROMPT_MASK_BP)
ANSWERS = (ANSWER_BA, ANSWER_MASK_BA)
# Other shapes sum in another order in fp32, and random models amplify the rounding: by how much depends on the CPU.
ATOL, RTOL = 5e-5, 1e-5


def student_of(lm: PreTrainedModel, passes: int = 3) -> LatentStudent:
    return LatentStudent(lm, new_reasoning(lm, latents=5, passes=passes, seed=1))


def kept_answer(student: LatentStudent) -> tuple[Tensor, Tensor, Tensor]:
    reading = student.read_answer(student.think(student.read_prompt(*PROMPTS)), *ANSWERS)
    return reading.hidden_BAE, reading.k_BLHMD, reading.v_BLHMD


def scalar(hidden_BAE: Tensor, k_BLHMD: Tensor, v_BLHMD: Tensor) -> Tensor:
    """A number that depends on every valid output in its own way."""
    weights = torch.linspace(-1, 1, hidden_BAE.shape[-1], dtype=hidden_BAE.dtype)
    answers = (hidden_BAE * weights)[ANSWER_MASK_BA].square().mean()
    return answers + k_BLHMD.square().mean() + v_BLHMD.mul(weights[: v_BLHMD.shape[-1]]).square().mean()


def gradients(student: LatentStudent, found: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    student.zero_grad()
    scalar(*found).backward()
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=ATOL, rtol=RTOL, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_kept_prompt_gives_the_results_and_gradients_of_reading_it_again(name: str) -> None:
    student = student_of(ARCHITECTURES[name]()).eval()
    kept, again = kept_answer(student), answer_reading(student, *PROMPTS, *ANSWERS)
    torch.testing.assert_close(kept[0][ANSWER_MASK_BA], again[0][ANSWER_MASK_BA], atol=ATOL, rtol=RTOL)
    torch.testing.assert_close(kept[1:], again[1:], atol=ATOL, rtol=RTOL)
    assert_same(gradients(student, kept), gradients(student, again))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "mistral-window"])
def test_gradient_checkpointing_keeps_the_prompt(name: str) -> None:
    student = student_of(ARCHITECTURES[name]()).train()
    expected = gradients(student, answer_reading(student, *PROMPTS, *ANSWERS))
    student.lm.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    assert_same(gradients(student, kept_answer(student)), expected)


def test_gradient_reaches_the_prompt_through_its_keys_and_values() -> None:
    student = student_of(build_model(tiny_spec("qwen2")))
    prompt = student.read_prompt(*PROMPTS)
    student.think(prompt).latents_BME.square().sum().backward()
    table: Any = student.lm.get_input_embeddings()
    # Token 9 is in the middle of a prompt, so only attention carries its gradient.
    assert table.weight.grad[9].abs().max() > 0


@torch.no_grad()
def test_in_bf16_the_kept_prompt_is_as_exact_as_reading_it_again() -> None:
    exact = student_of(build_model(tiny_spec("llama"))).eval()
    expected = answer_reading(exact, *PROMPTS, *ANSWERS)[0][ANSWER_MASK_BA]
    rounded = exact.to(torch.bfloat16)
    again = answer_reading(rounded, *PROMPTS, *ANSWERS)[0][ANSWER_MASK_BA].float()
    kept = kept_answer(rounded)[0][ANSWER_MASK_BA].float()
    error = (again - expected).norm()
    assert (kept - expected).norm() < 1.5 * error


@torch.no_grad()
def test_continuation_equals_the_text_read_at_once() -> None:
    student = student_of(build_model(tiny_spec("mistral"))).eval()
    continuation_BR = torch.tensor([[9, 8, 7, 2], [60, 2, 0, 0], [33, 34, 2, 0]])
    mask_BR = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    prompt = student.read_prompt(*PROMPTS, all_layers=True)
    reading = student.read_continuation(prompt, continuation_BR, mask_BR, all_layers=True)
    assert reading.states_BSRE is not None
    for row in range(3):
        prompt_ids, rest = PROMPT_BP[row][PROMPT_MASK_BP[row]], continuation_BR[row][mask_BR[row]]
        output = student.lm(torch.cat([prompt_ids, rest])[None], output_hidden_states=True)
        found = student.logits(reading.hidden_BRE[row, : len(rest)])
        torch.testing.assert_close(found, output.logits[0, len(prompt_ids) - 1 : -1], atol=ATOL, rtol=RTOL)
        states_SRE = torch.stack(output.hidden_states[1:])[:, 0, len(prompt_ids) - 1 : -1]
        torch.testing.assert_close(reading.states_BSRE[row, :, : len(rest)], states_SRE, atol=ATOL, rtol=RTOL)


@torch.no_grad()
def test_rows_of_a_thought_may_repeat() -> None:
    student = student_of(build_model(tiny_spec("qwen2"))).eval()
    thought = student.think(student.read_prompt(*PROMPTS))
    rows = [2, 0, 0]
    found = student.read_answer(thought.rows(rows), ANSWER_BA[rows], ANSWER_MASK_BA[rows])
    expected = student.read_answer(thought, *ANSWERS)
    torch.testing.assert_close(found.hidden_BAE, expected.hidden_BAE[rows])
