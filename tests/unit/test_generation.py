"""Tests of text generation, compared with greedy decoding of single prompts without a cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import GenerationConfig, MambaConfig, MambaForCausalLM

from evaluation.models import load_model
from kvcore.errors import UnsupportedModelError
from kvdistill import load_student
from student_trainer.model.generation import (
    Row,
    Sampled,
    Start,
    TextEnd,
    after_prompt,
    end_tokens,
    generate,
    left_padded,
    steps,
)
from student_trainer.model.latent import new_reasoning, save_reasoning
from student_trainer.model.pretrained import load_pretrained
from tests.support.tiny_models import FAMILIES, Family, build_model, build_tokenizer, save_tiny_model, tiny_spec

PROMPTS = ([7, 30, 41, 12, 9], [88, 5], [101], [60, 61, 62], [14, 99, 200, 3])
TOKENIZER = build_tokenizer("qwen2")
NO_END = TextEnd(TOKENIZER, [])
LIMIT = 10
# What a checkpoint may bring along. Each of them changes greedy text.
HOSTILE: dict[str, Any] = {
    "repetition_penalty": 3.0,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 4,
    "suppress_tokens": list(range(3, 40)),
    "do_sample": True,
    "temperature": 5.0,
    "top_k": 3,
    "max_length": 7,
}
QUESTIONS = ["Question: What is 2+3?\nAnswer:", "Question: no?\nAnswer:", "问题：四加五？\n答案："]


def prompts(rows: Sequence[Sequence[int]]) -> Start:
    return after_prompt(*left_padded(rows, torch.device("cpu")))


@torch.no_grad()
def naive(lm: Any, prompt: Sequence[int], count: int, ends: Sequence[int] = ()) -> list[int]:
    """Greedy decoding of one prompt: a full forward pass per token, up to an end token."""
    ids = list(prompt)
    for _ in range(count):
        token = int(lm(torch.tensor([ids])).logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    return ids[len(prompt) :]


def batch_sizes(lm: Any) -> list[int]:
    """A list to which every later pass of the model adds the size of its batch."""
    sizes: list[int] = []
    lm.register_forward_pre_hook(
        lambda _module, _given, named: sizes.append(len(named["attention_mask"])), with_kwargs=True
    )
    return sizes


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_greedy_decoding_of_each_prompt_alone(family: Family) -> None:
    lm = build_model(tiny_spec(family, layers=2))
    rows = generate(lm, prompts(PROMPTS), LIMIT, NO_END)
    assert [row.ids for row in rows] == [naive(lm, prompt, LIMIT) for prompt in PROMPTS]
    assert not any(row.ended for row in rows)
    assert {row.forward_passes for row in rows} == {LIMIT}


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_ended_leave_the_batch_and_change_no_other_row(family: Family) -> None:
    lm = build_model(tiny_spec(family, layers=2))
    whole = [naive(lm, prompt, LIMIT) for prompt in PROMPTS]
    # All rows but one end early, at different steps.
    ends = {whole[row][step] for row, step in ((0, 2), (1, 0), (3, 1), (4, 4))}
    expected = [naive(lm, prompt, LIMIT, tuple(ends)) for prompt in PROMPTS]
    lengths = [len(ids) for ids in expected]
    assert len(set(lengths)) > 2
    sizes = batch_sizes(lm)
    rows = generate(lm, prompts(PROMPTS), LIMIT, TextEnd(TOKENIZER, ends))
    assert [row.ids for row in rows] == expected
    assert [row.ended for row in rows] == [length < LIMIT for length in lengths]
    open_rows = [sum(length >= step for length in lengths) for step in range(len(sizes))]
    assert len(sizes) == min(LIMIT, max(lengths) + 1), "generation goes on until the last row ends, and no longer"
    assert sizes[0] == len(PROMPTS)
    assert sizes[-1] < len(PROMPTS)
    assert all(count <= size < 2 * count for count, size in zip(open_rows, sizes, strict=True))


def test_generation_stops_when_all_rows_have_ended() -> None:
    lm = build_model(tiny_spec("qwen2", layers=2))
    first = {naive(lm, prompt, 1)[0] for prompt in PROMPTS}
    sizes = batch_sizes(lm)
    rows = generate(lm, prompts(PROMPTS), 500, TextEnd(TOKENIZER, first))
    assert rows == [Row([], ended=True, forward_passes=1)] * len(PROMPTS)
    assert len(sizes) == 1


def test_a_stop_text_ends_a_row_and_is_cut_off() -> None:
    lm = build_model(tiny_spec("qwen2", layers=2))
    ids = naive(lm, PROMPTS[0], LIMIT)
    whole = str(TOKENIZER.decode(ids))
    stop = whole[4:6]
    end = TextEnd(TOKENIZER, [], [stop, ""])
    (row,) = generate(lm, prompts(PROMPTS[:1]), LIMIT, end)
    assert row.ended
    assert len(row.ids) < LIMIT
    assert end.answer(row).text == whole[: whole.index(stop)]
    assert end.answer(row).finished


def test_steps_show_the_tokens_as_they_come() -> None:
    lm = build_model(tiny_spec("qwen2", layers=2))
    seen = [len(rows[0].ids) for rows in steps(lm, prompts(PROMPTS[:1]), 5, NO_END)]
    assert seen == [1, 2, 3, 4, 5]


def test_a_model_without_a_cache_of_keys_and_values_is_refused() -> None:
    config = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(UnsupportedModelError, match="MambaForCausalLM has no cache of keys and values"):
        generate(MambaForCausalLM(config), prompts([[1, 2]]), 2, NO_END)


# ---------------------------------------------------------------------------------------------------------- sampling


def test_draws_follow_the_probabilities_within_top_p() -> None:
    probabilities = torch.tensor([0.05, 0.5, 0.15, 0.3], dtype=torch.float64)
    rows = 4000
    logits_BV = (probabilities.log() * 2.0).expand(rows, -1)  # A temperature of 2 gives the probabilities back.
    for top_p, kept in ((1.0, [0, 1, 2, 3]), (0.81, [1, 2, 3]), (0.79, [1, 3]), (0.1, [1])):
        drawn_B = Sampled(2.0, top_p, range(rows))(logits_BV, range(rows))
        shares = torch.bincount(drawn_B, minlength=4).double() / rows
        expected = torch.zeros(4, dtype=torch.float64)
        expected[kept] = probabilities[kept] / probabilities[kept].sum()
        assert torch.allclose(shares, expected, atol=0.03), top_p
        assert shares[expected == 0].sum() == 0


def test_a_sampled_text_depends_on_its_seed_and_not_on_the_batch() -> None:
    lm = build_model(tiny_spec("llama", layers=2))
    end = TextEnd(TOKENIZER, {naive(lm, PROMPTS[1], 1)[0]})

    def sampled(rows: Sequence[int], seed: int) -> list[list[int]]:
        choose = Sampled(1.0, 0.9, [seed + row for row in rows])
        start = prompts([PROMPTS[row] for row in rows])
        return [row.ids for row in generate(lm, start, LIMIT, end, choose)]

    together = sampled(range(5), 7)
    assert [sampled([row], 7)[0] for row in range(5)] == together
    assert sampled(range(5), 8) != together


# ----------------------------------------------------------------------------------------- settings of the checkpoint


@pytest.fixture(scope="module", params=["plain", "latent"])
def directories(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same student twice: with an end token only, and with hostile generation settings."""
    pair: list[Path] = []
    for name, extra in (("tame", {}), ("hostile", HOSTILE)):
        directory = save_tiny_model(tmp_path_factory.mktemp(name), tiny_spec("llama", layers=2, seed=3))
        if request.param == "latent":
            lm, _ = load_pretrained(str(directory), "auto", "path")
            reasoning = new_reasoning(lm, 3, 2, seed=5)
            save_reasoning(reasoning, reasoning.state_dict(), directory)
        GenerationConfig(eos_token_id=2, **extra).save_pretrained(directory)
        pair.append(directory)
    return pair[0], pair[1]


def evaluated(directory: Path) -> list[str]:
    requests: list[Any] = [
        Instance("generate_until", {}, (question, {"until": [], "max_gen_toks": LIMIT}), 0, metadata=("task", 0, 1))
        for question in QUESTIONS
    ]
    return load_model(str(directory), "fp32", "cpu", 2).generate_until(requests)


def test_generation_settings_of_the_checkpoint_change_no_answer(directories: tuple[Path, Path]) -> None:
    tame, hostile = directories
    answers = evaluated(tame)
    assert len(set(answers)) == len(QUESTIONS)
    assert evaluated(hostile) == answers
    assert load_student(hostile, device="cpu").generate(QUESTIONS, LIMIT) == answers


def test_every_end_token_of_the_checkpoint_ends_an_answer(directories: tuple[Path, Path]) -> None:
    tame, _ = directories
    student = load_student(tame, device="cpu")
    ids = student.tokenizer.encode(student.generate(QUESTIONS[0], LIMIT)[0], add_special_tokens=False)
    lm: Any = student.lm
    lm.generation_config.eos_token_id = [2, ids[3]]
    assert end_tokens(lm, student.tokenizer) == {2, ids[3]}
    lm.generation_config.eos_token_id = None
    assert end_tokens(lm, student.tokenizer) == {2}
