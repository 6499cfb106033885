"""Tests of the lm-eval interface of a latent student: latents in every request, and results independent of batching."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lm_eval.api.instance import Instance
from rich.console import Console

from benchmarks.whole_readings import answer_reading, latents_of
from data.collate import Collator
from evaluation.latent_lm import LatentLM, NoLikelihoodError
from evaluation.metered_lm import MeteredLM
from evaluation.models import load_model
from kvcore.errors import FieldError
from kvcore.models.latent_folder import LATENT_WEIGHTS
from student_trainer.model.generation import TextEnd, after_latents, after_prompt, generate
from student_trainer.model.latent import new_reasoning, save_reasoning
from student_trainer.model.pretrained import load_pretrained
from tests.support.chat_templates import TINY_CHATML, with_template
from tests.support.tiny_models import save_tiny_model, tiny_spec

LATENTS = 3
PROMPTS = ["Question: What is 2+3?\nAnswer:", "Question: no?\nAnswer:", "问题：四加五？\n答案："]
CHOICES = [" yes", " no way, never", " 9"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved student; Llama's tokenizer prepends a BOS."""
    made = save_tiny_model(tmp_path_factory.mktemp("student"), tiny_spec("llama", layers=2, seed=3))
    lm, _ = load_pretrained(str(made), "auto", "path")
    reasoning = new_reasoning(lm, LATENTS, 2, seed=5)
    save_reasoning(reasoning, reasoning.state_dict(), made)
    return made


@pytest.fixture(scope="module")
def model(directory: Path) -> LatentLM:
    made = load_model(str(directory), "fp32", "cpu", 2)
    assert isinstance(made, LatentLM)
    return made


def generation(prompt: str, tokens: int, until: tuple[str, ...] = ()) -> Instance:
    return request("generate_until", prompt, {"until": list(until), "do_sample": False, "max_gen_toks": tokens})


def request(kind: Any, *arguments: Any) -> Instance:
    return Instance(kind, {}, arguments, 0, metadata=("task", 0, 1))


def pairs() -> list[Instance]:
    return [request("loglikelihood", prompt, choice) for prompt in PROMPTS for choice in CHOICES]


def test_generation_continues_after_the_latents_of_each_prompt(model: LatentLM) -> None:
    generated = model.generate_until([generation(prompt, 6) for prompt in PROMPTS], disable_tqdm=True)
    collator = Collator(model.tokenizer, 512)
    end = TextEnd(model.tokenizer, {model.eot_token_id})
    for prompt, text in zip(PROMPTS, generated, strict=True):
        start = after_latents(model.student, *collator.prompts([prompt]))
        assert text == end.answer(generate(model.student.lm, start, 6, end)[0]).text
    without = generate(model.student.lm, after_prompt(*collator.prompts(PROMPTS[:1])), 6, end)
    assert generated[0] != end.answer(without[0]).text


@pytest.mark.parametrize("latent", [True, False])
def test_a_chats_choice_follows_the_assistants_header_without_a_space(
    directory: Path, tmp_path: Path, latent: bool
) -> None:
    if latent:
        shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    else:
        save_tiny_model(tmp_path, tiny_spec("llama", layers=2, seed=3))
    with_template(tmp_path, TINY_CHATML)
    made = load_model(str(tmp_path), "fp32", "cpu", 2, "chat", "Be brief.")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPTS[0]}]
    rendered = made.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt_ids, choice_ids = made._encode_pair(PROMPTS[0], " 9")
    assert prompt_ids == made.tokenizer(rendered, add_special_tokens=False).input_ids
    assert choice_ids == made.tokenizer("9", add_special_tokens=False).input_ids


def test_generation_stops_at_the_tasks_stop_text(model: LatentLM) -> None:
    (whole,) = model.generate_until([generation(PROMPTS[0], 8)], disable_tqdm=True)
    stop = whole[2:4]
    (cut,) = model.generate_until([generation(PROMPTS[0], 8, (stop,))], disable_tqdm=True)
    assert cut == whole.split(stop)[0]


def test_likelihood_is_conditioned_on_prompt_and_latents(model: LatentLM) -> None:
    found = model.loglikelihood(pairs(), disable_tqdm=True)
    collator = Collator(model.tokenizer, 512)
    for each, (likelihood, greedy) in zip(pairs(), found, strict=True):
        prompt, choice = cast("tuple[str, str]", each.args)
        ids = model.tokenizer.encode(choice, add_special_tokens=False)
        ids_A = torch.tensor(ids)
        with torch.no_grad():
            hidden_BAE, *_ = answer_reading(
                model.student, *collator.prompts([prompt]), ids_A[None], torch.ones(1, len(ids)).bool()
            )
            logs_AV = model.student.logits(hidden_BAE)[0].double().log_softmax(-1)
        assert likelihood == pytest.approx(float(logs_AV[torch.arange(len(ids)), ids_A].sum()), abs=1e-4)
        assert greedy == bool((logs_AV.argmax(-1) == ids_A).all())


def test_greedy_generation_is_marked_greedy_by_likelihood(model: LatentLM) -> None:
    ids_BP, mask_BP = Collator(model.tokenizer, 512).prompts(PROMPTS[:1])
    with torch.no_grad():
        inputs_BTE = latents_of(model.student, ids_BP, mask_BP)
        hidden_BTE = model.student.hidden(inputs_BTE, torch.ones(inputs_BTE.shape[:2]).bool())
        best = int(model.student.logits(hidden_BTE[0, -1]).argmax())
    found = model._loglikelihood_tokens([(("", ""), model.tok_encode(PROMPTS[0]), [best])], disable_tqdm=True)
    assert found[0][1] is True
    assert -math.log(model.vocab_size) < found[0][0] < 0


def test_results_do_not_depend_on_the_batch_size(model: LatentLM) -> None:
    alone = [model.loglikelihood([each], disable_tqdm=True)[0][0] for each in pairs()]
    together = [value for value, _ in model.loglikelihood(pairs(), disable_tqdm=True)]
    assert together == pytest.approx(alone, abs=1e-4)
    texts = [model.generate_until([generation(prompt, 5)], disable_tqdm=True)[0] for prompt in PROMPTS]
    assert model.generate_until([generation(prompt, 5) for prompt in PROMPTS], disable_tqdm=True) == texts


def test_latents_reduce_max_length(model: LatentLM) -> None:
    assert model.max_length == model.model.config.max_position_embeddings - LATENTS


def test_text_without_prompt_has_no_likelihood(model: LatentLM) -> None:
    with pytest.raises(NoLikelihoodError, match="task 'task' needs the likelihood of text"):
        model.loglikelihood_rolling([request("loglikelihood_rolling", "text")])


def test_chunked_requests_return_in_order(model: LatentLM) -> None:
    metered = MeteredLM(model, "made-up", Console(force_terminal=False))
    likelihoods = [value for value, _ in metered.loglikelihood(pairs())]
    assert likelihoods == pytest.approx(
        [value for value, _ in model.loglikelihood(pairs(), disable_tqdm=True)], abs=1e-4
    )
    many = [generation(f"Question: {index}?\nAnswer:", 4) for index in range(11)]
    assert metered.generate_until(many) == model.generate_until(many, disable_tqdm=True)
    assert metered.truncated == 0


def test_truncated_prompts_are_counted(model: LatentLM) -> None:
    metered = MeteredLM(model, "made-up", Console(force_terminal=False))
    long = "word " * model.max_length
    metered.generate_until([generation(long, 4), generation(PROMPTS[0], 4)])
    assert metered.truncated == 1
    metered.loglikelihood([request("loglikelihood", f"other {long}", choice) for choice in CHOICES])
    assert metered.truncated == 2


def test_prompts_with_an_unfinished_answer_are_noted(model: LatentLM) -> None:
    metered = MeteredLM(model, "made-up", Console(force_terminal=False))
    (whole,) = metered.generate_until([generation(PROMPTS[0], 8)])
    assert metered.unfinished == {PROMPTS[0]}
    metered = MeteredLM(model, "made-up", Console(force_terminal=False))
    cut, _ = metered.generate_until([generation(PROMPTS[0], 8, (whole[2:4],)), generation(PROMPTS[1], 1)])
    assert cut == whole[:2]
    assert metered.unfinished == {PROMPTS[1]}


def test_a_task_that_samples_gets_other_texts_of_the_same_prompt(model: LatentLM) -> None:
    settings = {"until": [], "do_sample": True, "temperature": 1.0, "max_gen_toks": 6}
    requests = [request("generate_until", PROMPTS[0], settings) for _ in range(4)]
    assert len(set(model.generate_until(requests))) > 1
    greedy = {**settings, "temperature": 0.0}
    assert model.generate_until([request("generate_until", PROMPTS[0], greedy)]) == model.generate_until(
        [generation(PROMPTS[0], 6)]
    )


def test_directory_without_latents_loads_plain_model(tmp_path: Path) -> None:
    made = load_model(str(save_tiny_model(tmp_path, tiny_spec("qwen2", layers=1))), "auto", "auto", 2)
    assert not isinstance(made, LatentLM)
    (text,) = made.generate_until([generation(PROMPTS[0], 3)], disable_tqdm=True)
    assert isinstance(text, str)


def test_incomplete_latent_student_is_refused(directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    (tmp_path / LATENT_WEIGHTS).unlink()
    with pytest.raises(FieldError, match=f"{LATENT_WEIGHTS} is missing"):
        load_model(str(tmp_path), "auto", "cpu", 2)
    with pytest.raises(FieldError, match=r"--model_path: .* is not a directory"):
        load_model(str(tmp_path / "missing"), "auto", "cpu", 2)
    with pytest.raises(FieldError, match="'cuda:7' does not exist"):
        load_model(str(directory), "auto", "cuda:7", 2)
