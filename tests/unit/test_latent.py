"""Tests of latent reasoning, compared with loops over single unpadded prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import pad
from transformers import DynamicCache

from kvcore.errors import ConfigError
from kvcore.models.files import CONFIG
from kvcore.types import Tensor
from student_trainer.model.generation import TextEnd, after_latents, generate
from student_trainer.model.latent import (
    LatentStudent,
    Thought,
    load_reasoning,
    new_reasoning,
    save_reasoning,
)
from tests.support.tiny_models import FAMILIES, Family, build_model, build_tokenizer, save_tiny_model, tiny_spec

LATENTS, PASSES = 4, 2
PROMPTS = ([7, 30, 41, 12, 9], [88, 5], [101])
ANSWERS = ([60, 2], [33, 34, 2], [19, 2])


def student_of(family: Family = "qwen3", passes: int = PASSES, latents: int = LATENTS) -> LatentStudent:
    lm = build_model(tiny_spec(family, layers=2))
    reasoning = new_reasoning(lm, latents, passes, seed=5)
    with torch.no_grad():
        for parameter in reasoning.projection.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(6)))
    return LatentStudent(lm, reasoning).eval()


def left_padded(rows: tuple[list[int], ...], extra: int = 0) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows)) + extra
    ids = torch.stack([pad(torch.tensor(row), (width - len(row), 0)) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows])
    return ids, mask


def right_padded(rows: tuple[list[int], ...]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.stack([pad(torch.tensor(row), (0, width - len(row))) for row in rows])
    return ids, torch.stack([torch.arange(width) < len(row) for row in rows])


def thought_of(student: LatentStudent, ids_BP: Tensor, mask_BP: Tensor) -> Thought:
    return student.think(student.read_prompt(ids_BP, mask_BP))


def embed(student: LatentStudent, ids: list[int]) -> list[Tensor]:
    table: Any = student.lm.get_input_embeddings()
    return list(table.weight.detach()[ids])


def naive_latents(student: LatentStudent, prompt: list[int]) -> list[Tensor]:
    """Jacobi iteration: the next input of latent i is the projected last hidden state of the position before it."""
    latents = list(student.reasoning.first_inputs.weight.detach())
    for _ in range(student.reasoning.passes):
        inputs = torch.stack(embed(student, prompt) + latents)[None]
        hidden_TE = student.lm.base_model(inputs_embeds=inputs).last_hidden_state[0]
        latents = [student.reasoning.projection(hidden_TE[len(prompt) + i - 1]) for i in range(len(latents))]
    return latents


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_padded_batch_equals_its_prompts_run_one_by_one(family: Family) -> None:
    student = student_of(family)
    answer_ids_BA, answer_mask_BA = right_padded(ANSWERS)
    reading = student.read_answer(thought_of(student, *left_padded(PROMPTS)), answer_ids_BA, answer_mask_BA)
    logits_BAV, k_BLHMD, v_BLHMD = student.logits(reading.hidden_BAE), reading.k_BLHMD, reading.v_BLHMD
    assert k_BLHMD.shape == v_BLHMD.shape == (3, 2, 2, LATENTS, 16)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        before = embed(student, prompt) + naive_latents(student, prompt)
        cache = DynamicCache()
        output: Any = student.lm(
            inputs_embeds=torch.stack(before + embed(student, answer[:-1]))[None], past_key_values=cache
        )
        for place in range(len(answer)):
            expected = output.logits[0, len(before) - 1 + place]
            torch.testing.assert_close(logits_BAV[row, place], expected, atol=1e-5, rtol=1e-5)
        for number, layer in enumerate(cache.layers):
            cached: Any = layer
            expected = cached.values[0, :, len(prompt) : len(before)]
            torch.testing.assert_close(v_BLHMD[row, number], expected, atol=1e-5, rtol=1e-5)
        # The keys of layer 0 come directly from the input embeddings.
        first: Any = student.lm.get_submodule("model.layers.0")
        x_ME = first.input_layernorm(torch.stack(before[-LATENTS:]))
        k_MHD = first.self_attn.k_proj(x_ME).unflatten(-1, (-1, 16))
        if family == "qwen3":
            k_MHD = first.self_attn.k_norm(k_MHD)
        torch.testing.assert_close(k_BLHMD[row, 0], k_MHD.transpose(0, 1), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_tokens_do_not_change_the_results() -> None:
    student = student_of()
    ids_BP, mask_BP = left_padded(PROMPTS)
    answers = right_padded(ANSWERS)
    filled = (torch.where(mask_BP, ids_BP, 77), mask_BP, torch.where(answers[1], answers[0], 78), answers[1])
    reading = student.read_answer(thought_of(student, ids_BP, mask_BP), *answers)
    other = student.read_answer(thought_of(student, *filled[:2]), *filled[2:])
    torch.testing.assert_close((other.k_BLHMD, other.v_BLHMD), (reading.k_BLHMD, reading.v_BLHMD))
    torch.testing.assert_close(other.hidden_BAE[answers[1]], reading.hidden_BAE[answers[1]])


@pytest.mark.parametrize("passes", [1, 2, 3])
@torch.no_grad()
def test_each_pass_fixes_one_more_latent(passes: int) -> None:
    """After T passes the first T latents equal sequential decoding and do not depend on the first inputs."""
    student = student_of(passes=passes)
    ids_BP, mask_BP = left_padded(PROMPTS)
    inputs = thought_of(student, ids_BP, mask_BP).inputs()
    student.reasoning.first_inputs.weight.mul_(-3.0)
    changed = thought_of(student, ids_BP, mask_BP).inputs()
    settled = ids_BP.shape[1] + passes
    torch.testing.assert_close(changed[:, :settled], inputs[:, :settled])
    assert (changed[:, settled] - inputs[:, settled]).abs().amax(dim=1).min() > 1e-3


def test_gradients_pass_through_every_pass_to_all_latent_parameters() -> None:
    student = student_of()
    answers = right_padded(ANSWERS)
    reading = student.read_answer(thought_of(student, *left_padded(PROMPTS)), *answers)
    (reading.k_BLHMD.square().sum() + reading.v_BLHMD.square().sum()).backward()
    for name, parameter in student.reasoning.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def naive_greedy(student: LatentStudent, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding after the latents without a cache: a full forward pass per token."""
    inputs = embed(student, prompt) + naive_latents(student, prompt)
    generated: list[int] = []
    for _ in range(count):
        output: Any = student.lm(inputs_embeds=torch.stack(inputs + embed(student, generated))[None])
        generated.append(int(output.logits[0, -1].argmax()))
    return generated


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_generation_is_greedy_decoding_of_each_prompt_alone(family: Family) -> None:
    student = student_of(family)
    expected = [naive_greedy(student, prompt, 6) for prompt in PROMPTS]
    assert len(set(map(tuple, expected))) == 3
    no_end = TextEnd(build_tokenizer(family), [])
    for extra in (0, 9):
        rows = generate(student.lm, after_latents(student, *left_padded(PROMPTS, extra)), 6, no_end)
        assert [row.ids for row in rows] == expected
        assert {row.forward_passes for row in rows} == {1 + PASSES + 6}


@torch.no_grad()
def test_read_text_matches_the_plain_model() -> None:
    student = student_of()
    ids_BT, mask_BT = right_padded(PROMPTS)
    reading = student.read_text(ids_BT, mask_BT)
    logits_BTV = student.logits(reading.hidden_BTE)
    assert reading.k_BLHTD.shape[1:3] == (2, 2)
    for row, ids in enumerate(PROMPTS):
        output: Any = student.lm(torch.tensor([ids]))
        torch.testing.assert_close(logits_BTV[row, : len(ids) - 1], output.logits[0, :-1], atol=1e-5, rtol=1e-5)


def test_new_parameters_have_the_scale_of_the_embeddings_and_are_equal_on_every_rank() -> None:
    lm = build_model(tiny_spec("qwen2"))
    table: Any = lm.get_input_embeddings()
    rms = float(table.weight.detach().square().mean().sqrt())
    torch.manual_seed(1)
    one = new_reasoning(lm, 64, 3, seed=0)
    after_one = torch.rand(1)
    torch.manual_seed(2)
    two, other = new_reasoning(lm, 64, 3, seed=0), new_reasoning(lm, 64, 3, seed=1)
    assert all(a.equal(b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not one.first_inputs.weight.equal(other.first_inputs.weight)
    torch.manual_seed(1)
    assert torch.rand(1) == after_one, "the run's own random numbers are left alone"
    for inputs in (one.first_inputs.weight, one.projection(torch.randn(64, 48))):
        assert float(inputs.detach().square().mean().sqrt()) == pytest.approx(rms, rel=0.1)


def test_latent_parameters_are_saved_and_loaded(tmp_path: Path) -> None:
    student = student_of()
    save_tiny_model(tmp_path, tiny_spec("qwen2", layers=1))
    save_reasoning(student.reasoning, dict(student.reasoning.state_dict()), tmp_path)
    loaded = load_reasoning(student.lm, tmp_path, LATENTS, passes=7)
    assert loaded is not None
    saved = student.reasoning.state_dict()
    assert saved.keys() == loaded.state_dict().keys()
    assert all(tensor.equal(saved[name]) for name, tensor in loaded.state_dict().items())
    assert (loaded.latents, loaded.passes) == (LATENTS, 7), "the configuration sets the passes"
    tree = json.loads((tmp_path / CONFIG).read_text(encoding="utf-8"))
    assert (tree["latents"], tree["passes"], tree["text_config"]["model_type"]) == (4, 2, "qwen2")


def test_loading_from_a_student_without_latent_parameters_returns_none(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, tiny_spec("qwen2", layers=1))
    assert load_reasoning(build_model(tiny_spec("qwen2")), tmp_path, LATENTS, PASSES) is None


def test_a_different_number_of_latents_is_refused_with_both_numbers(tmp_path: Path) -> None:
    student = student_of()
    save_tiny_model(tmp_path, tiny_spec("qwen2", layers=1))
    save_reasoning(student.reasoning, dict(student.reasoning.state_dict()), tmp_path)
    with pytest.raises(ConfigError, match=r"student\.latents: .* trained with 4, the configuration says 5"):
        load_reasoning(student.lm, tmp_path, 5, PASSES)
